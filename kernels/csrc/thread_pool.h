// A small pool with an explicit thread count and passive waits.
//
// Not OpenMP: `import paddle` sets OMP_NUM_THREADS=1, spawned children inherit it, and libgomp beside Paddle's libiomp5
// hangs after a fork. Work is cut by index, never by thread, so results do not depend on the thread count.
#pragma once

#include <cstdint>
#include <type_traits>

namespace zk {

using Task = void (*)(void* context, int64_t index);

// Run task(context, i) for i in [0, count) on the pool and the calling thread; returns when all are done.
// Tasks must not throw. Calls from several threads are served one after another.
void parallel_run(int64_t count, Task task, void* context);

// Threads that parallel_run uses, the caller included; at least 1.
void set_num_threads(int count);
int num_threads();

// parallel_for(n, [&](int64_t i) { ... })
template <class Body>
inline void parallel_for(int64_t count, Body&& body) {
  using Fn = typename std::remove_reference<Body>::type;
  parallel_run(count, [](void* context, int64_t i) { (*static_cast<Fn*>(context))(i); },
               const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace zk

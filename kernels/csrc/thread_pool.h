// A small pool with an explicit thread count and passive waits.
//
// Not OpenMP: `import paddle` sets OMP_NUM_THREADS=1, spawned children inherit it, and libgomp beside Paddle's libiomp5
// hangs after a fork. Work is cut by index, never by thread, so results do not depend on the thread count.
#pragma once

#include <cstdint>
#include <type_traits>

namespace zk {

using Task = void (*)(void* context, int64_t index);

// Run task(context, i) for i in [0, count), count < 2^32, on the pool and the calling thread; return when all are done.
//
// Each thread starts on a contiguous stretch of indices and takes them in ascending order, then helps the others:
// number the indices as the data lies in memory. Threads that are late (asleep, or without a processor) are not waited
// for; the caller takes over their share. Tasks must not throw. A call from inside a task runs in that task's thread.
// Calls from several threads are served one after another. Tasks run in the default floating-point environment
// (rounding to nearest, denormals kept), whatever a library has set on the calling thread.
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

// Working memory of the calling thread, aligned to 64 bytes, kept until the thread ends. One user at a time: a task may
// not hold it across a call that asks for it too. `key` is for the user to note what the memory holds; it is 0 in fresh
// memory, and unique_keys() gives numbers that nobody else has.
struct Scratch {
  float* data = nullptr;
  int64_t floats = 0;
  uint64_t key = 0;
};
Scratch& scratch(int64_t floats);
uint64_t unique_keys(int64_t count);

}  // namespace zk

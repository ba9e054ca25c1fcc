#include "thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace zk {
namespace {

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Polls before a waiting thread goes to sleep: about the gap between two ops of one step (some tens of microseconds), so
// that a step costs no wake-ups, and an idle engine no processor time.
constexpr int SPINS = 4000;

struct Job {
  Task task = nullptr;
  void* context = nullptr;
  int64_t count = 0;
};

class Pool {
 public:
  explicit Pool(int helpers) {
    for (int i = 0; i < helpers; ++i) threads_.emplace_back([this] { serve(); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  int size() const { return static_cast<int>(threads_.size()) + 1; }

  void run(int64_t count, Task task, void* context) {
    job_ = Job{task, context, count};
    next_.store(0, std::memory_order_relaxed);
    busy_.store(static_cast<int>(threads_.size()), std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    if (sleepers_.load(std::memory_order_acquire) > 0) wake_.notify_all();
    work();
    for (int spin = 0; busy_.load(std::memory_order_acquire) > 0; ++spin) {
      if (spin < SPINS) {
        cpu_relax();
        continue;
      }
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, [this] { return busy_.load(std::memory_order_acquire) == 0; });
    }
  }

 private:
  void work() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < job_.count;) job_.task(job_.context, i);
  }

  void serve() {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; generation_.load(std::memory_order_acquire) == seen; ++spin) {
        if (spin < SPINS) {
          cpu_relax();
          continue;
        }
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1, std::memory_order_acq_rel);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
        sleepers_.fetch_sub(1, std::memory_order_acq_rel);
      }
      seen = generation_.load(std::memory_order_acquire);
      if (stop_) return;
      work();
      if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_all();
      }
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> busy_{0}, sleepers_{0};
  Job job_;
  bool stop_ = false;
};

int default_threads() {
  unsigned hardware = std::thread::hardware_concurrency();
  return hardware ? static_cast<int>(hardware) : 1;
}

std::mutex owner_mutex;  // one parallel_run or set_num_threads at a time
std::unique_ptr<Pool> pool;
int wanted = 0;

}  // namespace

void set_num_threads(int count) {
  std::lock_guard<std::mutex> lock(owner_mutex);
  wanted = count;
  if (pool && pool->size() != count) pool.reset();
}

int num_threads() {
  std::lock_guard<std::mutex> lock(owner_mutex);
  return wanted ? wanted : default_threads();
}

void parallel_run(int64_t count, Task task, void* context) {
  if (count <= 0) return;
  std::lock_guard<std::mutex> lock(owner_mutex);
  const int threads = wanted ? wanted : default_threads();
  if (threads == 1 || count == 1) {
    for (int64_t i = 0; i < count; ++i) task(context, i);
    return;
  }
  if (!pool) pool = std::make_unique<Pool>(threads - 1);
  pool->run(count, task, context);
}

}  // namespace zk

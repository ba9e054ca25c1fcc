#include "thread_pool.h"

#include <atomic>
#include <cassert>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace zk {
namespace {

using Clock = std::chrono::steady_clock;

// A waiting thread polls this long before it goes to sleep: longer than the gaps between the ops of one step, so that a
// step costs no wake-ups; short enough that an idle engine costs no processor time.
constexpr std::chrono::microseconds SPIN{100};

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Condition>
bool spin_until(Condition condition) {
  const Clock::time_point end = Clock::now() + SPIN;
  do {
    for (int i = 0; i < 32; ++i) {
      if (condition()) return true;
      cpu_relax();
    }
  } while (Clock::now() < end);
  return false;
}

// Some libraries switch a thread to flushing denormals; results would then depend on what else the process has loaded.
class DefaultFloatEnvironment {
 public:
#if defined(__x86_64__)
  DefaultFloatEnvironment() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(0x1F80); }
  ~DefaultFloatEnvironment() { __builtin_ia32_ldmxcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  DefaultFloatEnvironment() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~DefaultFloatEnvironment() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

thread_local bool inside_task = false;  // this thread works on a job: calls from the task run right here

struct Job {
  Task task = nullptr;
  void* context = nullptr;
};

// Indices [first, end) that nobody has taken yet, as first << 32 | end. The owner takes from the front, a thief the
// second half: both go on in ascending order. An index never comes back, so a value is never seen twice in a job.
struct alignas(64) Share {
  std::atomic<uint64_t> span{0};

  static uint64_t pack(uint64_t first, uint64_t end) { return first << 32 | end; }

  bool take(int64_t& index) {
    uint64_t seen = span.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t first = seen >> 32, end = seen & 0xffffffffu;
      if (first >= end) return false;
      if (span.compare_exchange_weak(seen, pack(first + 1, end), std::memory_order_relaxed)) {
        index = static_cast<int64_t>(first);
        return true;
      }
    }
  }

  bool steal_into(Share& mine) {
    uint64_t seen = span.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t first = seen >> 32, end = seen & 0xffffffffu;
      if (first >= end) return false;
      const uint64_t middle = first + (end - first) / 2;
      if (span.compare_exchange_weak(seen, pack(first, middle), std::memory_order_relaxed)) {
        mine.span.store(pack(middle, end), std::memory_order_relaxed);
        return true;
      }
    }
  }
};

// The gate says whether a job may be joined: generation << 17 | OPEN | number of helpers inside. A helper enters by
// compare-and-swap while the gate is open, so the caller, having shut it, waits for those inside and for nobody else.
constexpr uint64_t OPEN = 1u << 16;
constexpr uint64_t INSIDE = OPEN - 1;
constexpr int GENERATION_SHIFT = 17;

class Pool {
 public:
  explicit Pool(int helpers) : shares_(static_cast<size_t>(helpers) + 1) {
    for (int i = 0; i < helpers; ++i) threads_.emplace_back([this, i] { serve(static_cast<size_t>(i) + 1); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_.store(true);
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  int size() const { return static_cast<int>(shares_.size()); }

  void run(int64_t count, Task task, void* context) {
    job_ = Job{task, context};
    const uint64_t threads = shares_.size(), total = static_cast<uint64_t>(count);
    for (uint64_t t = 0; t < threads; ++t)
      shares_[t].span.store(Share::pack(total * t / threads, total * (t + 1) / threads), std::memory_order_relaxed);
    const uint64_t generation = (gate_.load(std::memory_order_relaxed) >> GENERATION_SHIFT) + 1;
    gate_.store(generation << GENERATION_SHIFT | OPEN);
    if (sleepers_.load() > 0) {
      { std::lock_guard<std::mutex> lock(mutex_); }  // who was about to sleep is asleep after this
      wake_.notify_all();
    }
    work(0);
    gate_.fetch_and(~OPEN);
    auto empty = [this] { return (gate_.load() & INSIDE) == 0; };
    if (empty() || spin_until(empty)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    caller_sleeps_.store(true);
    left_.wait(lock, empty);
    caller_sleeps_.store(false);
  }

 private:
  void work(size_t self) {
    for (;;) {
      for (int64_t i; shares_[self].take(i);) job_.task(job_.context, i);
      size_t other = 1;
      while (other < shares_.size() && !shares_[(self + other) % shares_.size()].steal_into(shares_[self])) ++other;
      if (other >= shares_.size()) return;
    }
  }

  bool enter(uint64_t& seen_generation) {
    uint64_t gate = gate_.load();
    do {
      seen_generation = gate >> GENERATION_SHIFT;
      if (!(gate & OPEN)) return false;
    } while (!gate_.compare_exchange_weak(gate, gate + 1));
    return true;
  }

  void leave() {
    const uint64_t gate = gate_.fetch_sub(1) - 1;
    if ((gate & (OPEN | INSIDE)) == 0 && caller_sleeps_.load()) {
      std::lock_guard<std::mutex> lock(mutex_);
      left_.notify_one();
    }
  }

  void serve(size_t self) {
    const DefaultFloatEnvironment environment;
    inside_task = true;
    uint64_t seen = 0;
    auto called = [&] { return stop_.load() || gate_.load() >> GENERATION_SHIFT != seen; };
    for (;;) {
      if (!spin_until(called)) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, called);
        sleepers_.fetch_sub(1);
      }
      if (stop_.load()) return;
      if (enter(seen)) {
        work(self);
        leave();
      }
    }
  }

  std::vector<Share> shares_;  // shares_[0] is the caller's
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_, left_;
  alignas(64) std::atomic<uint64_t> gate_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> caller_sleeps_{false}, stop_{false};
  Job job_;
};

// The one pool of the process. The lock makes it one parallel_run or set_num_threads at a time.
struct Owner {
  Owner() {
    const unsigned hardware = std::thread::hardware_concurrency();
    threads = hardware ? static_cast<int>(hardware) : 1;
#if !defined(_WIN32)
    pthread_atfork([] { the_owner().mutex.lock(); }, [] { the_owner().mutex.unlock(); }, [] {
      // Threads do not live on in a forked child. Their pool is given up, not destroyed: joining them would hang.
      (void)the_owner().pool.release();
      the_owner().mutex.unlock();
    });
#endif
  }
  ~Owner() {
    std::lock_guard<std::mutex> lock(mutex);
    threads = 1;  // the process is exiting: whoever still calls works alone
    pool.reset();
  }

  static Owner& the_owner() {
    static Owner owner;
    return owner;
  }

  std::mutex mutex;
  std::unique_ptr<Pool> pool;
  std::atomic<int> threads;
};

struct OwnScratch : Scratch {
  ~OwnScratch() { std::free(data); }
};

std::atomic<uint64_t> next_key{1};

}  // namespace

void set_num_threads(int count) {
  assert(count >= 1 && !inside_task);
  Owner& owner = Owner::the_owner();
  std::lock_guard<std::mutex> lock(owner.mutex);
  owner.threads = count;
  if (owner.pool && owner.pool->size() != count) owner.pool.reset();
}

int num_threads() { return Owner::the_owner().threads; }

void parallel_run(int64_t count, Task task, void* context) {
  assert(count < int64_t{1} << 32);
  if (count <= 0) return;
  const DefaultFloatEnvironment environment;
  if (count > 1 && !inside_task) {
    Owner& owner = Owner::the_owner();
    std::lock_guard<std::mutex> lock(owner.mutex);
    if (owner.threads > 1) {
      if (!owner.pool) owner.pool = std::make_unique<Pool>(owner.threads - 1);
      inside_task = true;
      owner.pool->run(count, task, context);
      inside_task = false;
      return;
    }
  }
  for (int64_t i = 0; i < count; ++i) task(context, i);
}

Scratch& scratch(int64_t floats) {
  thread_local OwnScratch own;
  if (own.floats < floats) {
    std::free(own.data);
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
    own.data = static_cast<float*>(std::aligned_alloc(64, bytes));
    own.floats = own.data ? floats : 0;
    own.key = 0;
    if (!own.data) std::terminate();  // inside a task nobody could catch an exception
  }
  return own;
}

uint64_t unique_keys(int64_t count) { return next_key.fetch_add(static_cast<uint64_t>(count)); }

}  // namespace zk

#include "base/threads.hpp"

#include <algorithm>
#include <array>
#include <sched.h>

namespace ponder {

namespace {

uint32_t usable_cores() {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        return std::max(1, CPU_COUNT(&set));
    return std::max(1u, std::thread::hardware_concurrency());
}

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

// About 20 microseconds: longer than the gap between two passes' groups, shorter than what a
// sleeping core would notice.
constexpr int spins = 1000;

} // namespace

struct Threads::Job {
    Task task;
    void *context;
    uint32_t tasks;
    std::atomic<uint32_t> next{0};
    uint32_t joined = 1; // workers that ever joined, under mutex_; the caller is worker 0
    std::atomic<uint32_t> active{0};

    void drain(uint32_t worker) {
        for (uint32_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
            task(context, i, worker);
    }
};

Threads::Threads(uint32_t count) : count_(std::min(count ? count : usable_cores(), 256u)) {
    workers_.reserve(count_);
    try {
        while (workers_.size() + 1 < count_)
            workers_.emplace_back([this] { work(); });
    } catch (const std::system_error &) { // the system allows no more: those that there are do it
        count_ = uint32_t(workers_.size()) + 1;
    }
}

Threads::Threads(uint32_t count, HostParallelFor host, void *user_data)
    : count_(std::min(count ? count : usable_cores(), 256u)), host_(host), user_data_(user_data) {}

Threads::~Threads() {
    {
        std::lock_guard lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (std::thread &worker : workers_)
        worker.join();
}

void Threads::work() {
    uint32_t seen = posted_.load();
    for (;;) {
        for (int i = 0; i < spins && posted_.load(std::memory_order_relaxed) == seen; ++i)
            pause();
        Job *job = nullptr;
        uint32_t worker = 0;
        {
            std::unique_lock lock(mutex_);
            wake_.wait(lock, [&] {
                if (stop_)
                    return true;
                seen = posted_.load();
                for (Job *candidate : jobs_)
                    if (candidate->joined < count_ && candidate->next.load() < candidate->tasks) {
                        job = candidate;
                        return true;
                    }
                return false;
            });
            if (stop_)
                return;
            worker = job->joined++;
            job->active.fetch_add(1);
        }
        job->drain(worker);
        job->active.fetch_sub(1, std::memory_order_release);
    }
}

void Threads::run(uint32_t tasks, Task task, void *context) {
    if (host_)
        return run_on_host(tasks, task, context);
    if (tasks <= 1 || count_ == 1) {
        for (uint32_t i = 0; i < tasks; ++i)
            task(context, i, 0);
        return;
    }
    Job job{task, context, tasks};
    {
        std::lock_guard lock(mutex_);
        jobs_.push_back(&job);
        posted_.fetch_add(1);
    }
    wake_.notify_all();
    job.drain(0);
    {
        std::lock_guard lock(mutex_);
        std::erase(jobs_, &job);
    }
    // Whoever still runs a task of this job finishes soon: tasks are short.
    for (int i = 0; job.active.load(std::memory_order_acquire) != 0; ++i)
        i < spins ? pause() : std::this_thread::yield();
}

void Threads::run_on_host(uint32_t tasks, Task task, void *context) {
    struct Shared {
        Task task;
        void *context;
        uint32_t count;
        std::array<std::atomic<bool>, 256> busy{};
    } shared{task, context, count_, {}};
    host_(
        user_data_, tasks,
        [](void *pointer, uint32_t i) {
            Shared &s = *static_cast<Shared *>(pointer);
            for (uint32_t worker = 0;; worker = (worker + 1) % s.count)
                if (!s.busy[worker].exchange(true, std::memory_order_acquire)) {
                    s.task(s.context, i, worker);
                    s.busy[worker].store(false, std::memory_order_release);
                    return;
                }
        },
        &shared);
}

} // namespace ponder

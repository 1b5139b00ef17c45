// The runtime's threads: a task list run by the calling thread and the pool's workers together,
// or by the host's own pool.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace ponder {

class Threads {
public:
    // task(context, i, worker): i < tasks; no two tasks run at once with the same worker < count().
    using Task = void (*)(void *context, uint32_t i, uint32_t worker);
    using HostParallelFor = void (*)(void *user_data, uint32_t count,
                                     void (*task)(void *context, uint32_t i), void *context);

    explicit Threads(uint32_t count); // 0 = the cores this process may use
    Threads(uint32_t count, HostParallelFor host, void *user_data);
    ~Threads();
    Threads(const Threads &) = delete;

    uint32_t count() const { return count_; }
    // Returns when all tasks are done. Concurrent calls share the workers. Tasks do not throw.
    void run(uint32_t tasks, Task task, void *context);
    template <class F> void run(uint32_t tasks, F &&function) {
        run(
            tasks,
            [](void *f, uint32_t i, uint32_t worker) {
                (*static_cast<std::remove_reference_t<F> *>(f))(i, worker);
            },
            &function);
    }
    // For tasks that throw: those that have not begun by then are left out, and what the first of
    // them threw is thrown in the end.
    template <class F> void run_throwing(uint32_t tasks, F &&function) {
        std::vector<std::exception_ptr> problems(tasks);
        std::atomic<bool> stop{false};
        run(tasks, [&](uint32_t i, uint32_t worker) {
            if (stop.load(std::memory_order_relaxed))
                return;
            try {
                function(i, worker);
            } catch (...) {
                problems[i] = std::current_exception();
                stop.store(true, std::memory_order_relaxed);
            }
        });
        for (const std::exception_ptr &problem : problems)
            if (problem)
                std::rethrow_exception(problem);
    }

private:
    struct Job;
    void work();
    void run_on_host(uint32_t tasks, Task task, void *context);

    uint32_t count_; // fixed once constructed
    const HostParallelFor host_ = nullptr;
    void *const user_data_ = nullptr;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<Job *> jobs_;         // open ones, under mutex_
    std::atomic<uint32_t> posted_{0}; // counts jobs, so that idle workers can spin without a lock
    std::atomic<bool> stop_{false};
};

} // namespace ponder

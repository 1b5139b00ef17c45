#include "train/peers.hpp"

#include "base/error.hpp"
#include "base/ring.hpp"

#include <exception>

namespace ponder {

Peers::Peers(const Options &options, std::string job)
    : rank_(uint32_t(options.integer("train.rank"))),
      count_(uint32_t(options.integer("train.world"))), address_(options.text("train.address")),
      job_(std::move(job)), patience_(options.number("train.patience")) {
    if (rank_ >= count_)
        throw_error(PONDER_E_ARGUMENT, "option 'train.rank': %u is not below train.world, %u",
                    rank_, count_);
}

Peers::~Peers() = default;

Peers::Share Peers::share(size_t streams) const {
    if (streams < count_)
        throw_error(PONDER_E_ARGUMENT, "a batch of %zu streams for %u processes", streams, count_);
    return {streams * rank_ / count_, streams * (rank_ + 1) / count_};
}

Ring &Peers::ring(const CallGuard &guard) {
    if (!ring_)
        ring_ = std::make_unique<Ring>(Ring::Place{rank_, count_, address_, job_, patience_},
                                       [&] { guard.check(); });
    return *ring_;
}

void Peers::together(uint64_t step, const CallGuard &guard, const std::function<void()> &work) {
    if (alone())
        return work();
    Ring &joined = ring(guard);
    struct State {
        uint64_t step, failed;
    } own{step, 0};
    std::exception_ptr failure;
    try {
        work();
    } catch (...) {
        failure = std::current_exception();
        own.failed = 1;
    }
    // The others are told even when this call is being cancelled.
    std::vector<State> all;
    for (const auto &bytes : joined.gather(std::as_bytes(std::span(&own, 1)), [] {})) {
        State state{};
        std::memcpy(&state, bytes.data(), std::min(bytes.size(), sizeof state));
        all.push_back(state);
    }
    if (failure)
        std::rethrow_exception(failure);
    for (size_t r = 0; r < all.size(); ++r) {
        if (all[r].step != step)
            throw_error(PONDER_E_MISMATCH,
                        "process %u is at step %llu, process %zu at %llu: resume them from the "
                        "same checkpoint",
                        rank_, static_cast<unsigned long long>(step), r,
                        static_cast<unsigned long long>(all[r].step));
        if (all[r].failed)
            throw_error(PONDER_E_CANCELLED, "process %zu did not finish the step", r);
    }
}

// After together() no process leaves before the step is taken: what follows is not cancelled.
std::vector<std::vector<std::byte>> Peers::gather_bytes(std::span<const std::byte> own,
                                                        const CallGuard &guard) {
    if (alone())
        return {{own.begin(), own.end()}};
    return ring(guard).gather(own, [] {});
}

// All join or none does.
bool Peers::group(const Device &device, const CallGuard &guard) {
    if (devices_ != Devices::unknown)
        return devices_ == Devices::grouped;
    devices_ = Devices::apart;
    const auto all = [&](bool ready) {
        const std::byte own{ready};
        for (const auto &one : gather_bytes({&own, 1}, guard))
            if (one.empty() || one[0] == std::byte{0})
                return false;
        return true;
    };
    const auto try_to = [](auto &&step) {
        try {
            step();
            return true;
        } catch (const Error &) {
            return false; // the hosts can do it as well
        }
    };
    std::vector<std::byte> key;
    if (!all(device.can_group() && (rank_ > 0 || try_to([&] {
                 const Device::GroupKey made = device.group_key();
                 key.assign(made.begin(), made.end());
             }))))
        return false;
    key = gather_bytes(key, guard)[0];
    Device::GroupKey shared{};
    std::copy_n(key.begin(), std::min(key.size(), shared.size()), shared.begin());
    if (all(try_to([&] { device.group_join(shared, rank_, count_, std::min(patience_, 60.0)); })))
        devices_ = Devices::grouped;
    return devices_ == Devices::grouped;
}

void Peers::sum(const Device &device, float *values, size_t count, const CallGuard &guard) {
    if (alone())
        return;
    if (device.on_host())
        return ring(guard).sum({values, count}, [] {});
    if (group(device, guard))
        return device.group_sum(values, count, patience_);
    std::vector<float> all(count);
    device.download(all.data(), values, count * sizeof(float));
    ring(guard).sum(all, [] {});
    device.upload(values, all.data(), count * sizeof(float));
}

} // namespace ponder

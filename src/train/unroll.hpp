// The inner loop of one stream, unrolled and differentiated.
//
// Chunks c = 0..n-1 are scored with the fast weights phi of the time and then learned from:
//     phi_0 = start,  g_c = d L_c(phi_c) / d phi,  phi_{c+1} = U(phi_c, g_c; moments, rates)
// The outer loss is the mean of L_c over the chunks after the first (over all of them where nothing
// is learned between chunks). Backwards through time, with lambda the adjoint of what step c wrote,
//     (d phi, d g, d moments, d rates) = U's vjp of lambda
//     lambda <- d phi + [weight d L_c + <d g, g_c>]'s gradient in phi
// The bracket is one recorded pass: it holds the second-order term. First order leaves d g out, and
// what remains is g_c itself. A window of chunks is differentiated at a time; the fast weights go on
// from window to window as constants. Between windows only weights and moments are kept, inside one
// also gradients; activations are computed again or kept, by option.
//
// An adapter that learns inside the pass is one recorded pass a chunk, (phi, slow) -> (L, phi'),
// whose vjp takes lambda directly.
#pragma once

#include "adapt/update_rule.hpp"
#include "tensor/program.hpp"

#include <map>
#include <span>
#include <vector>

namespace ponder {

class Adapter;
class Gpt2;
class Options;

template <class T> class Unroll {
public:
    // Values per element in the device's memory, as UpdateRule takes them; they change between calls.
    Unroll(const Gpt2 &model, const Adapter &adapter, const Options &options,
           std::shared_ptr<const Device> device, LearnedRates<T> learned);

    // Gradients of the outer loss, and what was seen on the way.
    struct Result {
        std::vector<T> fast, rate, keep; // over the fast weights, per element
        std::vector<T> slow;             // in the order of Adapter::slow()
        double loss = 0, first = 0, reconstruction = 0; // means; first: of the first chunk
        uint64_t predictions = 0;                       // that `loss` is the mean of
        uint64_t chunks = 0, steps = 0, flops = 0;
    };
    // What one call needs, to be used by one call at a time.
    class Work;
    std::shared_ptr<Work> make_work() const;

    size_t chunks_of(size_t tokens) const { return tokens / size_t(chunk_); }
    // On the calling thread alone. At least two chunks of tokens.
    Result run(std::span<const int32_t> stream, Work &work,
               const std::function<void()> &check) const;

private:
    struct Pass;
    struct Node;
    enum PassSegment : size_t { forward_segment, gradient_segment, adjoint_segment };

    std::shared_ptr<const Pass> record(int64_t context) const;
    const Pass &pass(size_t chunk) const;
    void load(std::span<const int32_t> stream, size_t chunk, Work &work) const;
    Program::Bindings bind(const Pass &pass, Work &work, const Node &node) const;
    void run_segment(PassSegment segment, const Node &node, Work &work, Result &result,
                     const std::function<void()> &check) const;
    void forward(std::span<const int32_t> stream, size_t chunk, Work &work, Result &result,
                 const std::function<void()> &check) const;
    void backward(std::span<const int32_t> stream, Work &work, Result &result,
                  const std::function<void()> &check) const;
    void backward_between(const Node &node, Work &work, Result &result,
                          const std::function<void()> &check) const;
    void backward_inside(const Node &node, Work &work, Result &result,
                         const std::function<void()> &check) const;
    double weight(size_t chunk, const Work &work) const; // of its loss in the outer loss

    const Gpt2 &model_;
    const Adapter &adapter_;
    std::shared_ptr<const Device> device_;
    UpdateRuleOf<T> rule_;
    LearnedRates<T> learned_;
    int64_t chunk_, context_;
    uint64_t steps_, window_;
    bool inner_, higher_, keep_, carry_, inside_;
    double reconstruction_;
    size_t fast_count_, slow_count_;
    // sum = a + b, or a + factor b.
    struct Sum {
        Id a, b, factor = none, scaled = none, sum;
        std::unique_ptr<const Program> program;
    };
    Sum record_sum(size_t count, bool factor) const;
    void add(const Sum &sum, T *to, const T *from, const T *factor, Work &work) const;
    Sum sum_fast_, sum_slow_, sum_scaled_;
    std::map<int64_t, std::shared_ptr<const Pass>> passes_; // by tokens of context before the chunk
    size_t arena_ = 0, workspace_ = 0;
};

} // namespace ponder

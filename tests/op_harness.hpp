// Calls single ops of a backend in tests: tensors in, tensors out, every task of the plan run.
//
//     OpRunner ops(backend);
//     auto out = ops.run("linear", {x, w.frozen(), none(), none()}, {{DType::f32, {2, 5, 7}}},
//     {0}); EXPECT_LE(relative_error(out[0], expected), 1e-5);
#pragma once

#include "base/dtype.hpp"
#include "ponder/backend.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace ponder::test {

using Shape = std::vector<int64_t>;

inline int64_t element_count(const Shape &shape) {
    int64_t n = 1;
    for (int64_t d : shape)
        n *= d;
    return n;
}

// 64-byte aligned bytes that cannot be confused with results: all ones is NaN in every float type.
class Block {
public:
    explicit Block(size_t size) : size_(size) {
        const size_t rounded = (std::max<size_t>(size, 1) + 63) / 64 * 64;
        data_.reset(static_cast<std::byte *>(std::aligned_alloc(64, rounded)));
        if (!data_)
            throw std::bad_alloc();
        std::memset(data_.get(), 0xff, rounded);
    }
    std::byte *data() const { return data_.get(); }
    size_t size() const { return size_; }

private:
    struct Free {
        void operator()(std::byte *p) const { std::free(p); }
    };
    std::unique_ptr<std::byte, Free> data_;
    size_t size_;
};

// A host tensor. Copies share the data.
struct Tensor {
    DType type = DType::none;
    Shape shape;
    std::shared_ptr<Block> block;
    bool constant = false;

    Tensor() = default;
    Tensor(DType type_, Shape shape_)
        : type(type_), shape(std::move(shape_)),
          block(std::make_shared<Block>(size_t(element_count(shape)) * size_of(type))) {}

    int64_t count() const { return element_count(shape); }
    template <class T> T *as() const { return reinterpret_cast<T *>(block->data()); }

    double at(int64_t i) const {
        switch (type) {
        case DType::f32:
            return as<float>()[i];
        case DType::f64:
            return as<double>()[i];
        case DType::bf16:
            return to_float(as<bf16>()[i]);
        case DType::i32:
            return as<int32_t>()[i];
        case DType::i8:
            return as<int8_t>()[i];
        default:
            throw std::logic_error("an absent tensor has no elements");
        }
    }
    void set(int64_t i, double x) const {
        switch (type) {
        case DType::f32:
            as<float>()[i] = float(x);
            break;
        case DType::f64:
            as<double>()[i] = x;
            break;
        case DType::bf16:
            as<bf16>()[i] = to_bf16(float(x));
            break;
        case DType::i32:
            as<int32_t>()[i] = int32_t(x);
            break;
        case DType::i8:
            as<int8_t>()[i] = int8_t(x);
            break;
        default:
            throw std::logic_error("an absent tensor has no elements");
        }
    }
    std::vector<double> values() const {
        std::vector<double> v(static_cast<size_t>(count()));
        for (int64_t i = 0; i < count(); ++i)
            v[size_t(i)] = at(i);
        return v;
    }
    // A deep copy of another type.
    Tensor to(DType other) const {
        if (type == DType::none || type == DType::i32 || type == DType::i8)
            return *this;
        Tensor t(other, shape);
        t.constant = constant;
        for (int64_t i = 0; i < count(); ++i)
            t.set(i, at(i));
        return t;
    }
    // The same data as another shape.
    Tensor reshaped(Shape other) const {
        Tensor t = *this;
        t.shape = std::move(other);
        return t;
    }
    // The same data, handed to the plan as a constant.
    Tensor frozen() const {
        Tensor t = *this;
        t.constant = true;
        return t;
    }
};

inline Tensor none() { return {}; }

inline Tensor filled(DType type, const Shape &shape, double value) {
    Tensor t(type, shape);
    for (int64_t i = 0; i < t.count(); ++i)
        t.set(i, value);
    return t;
}

inline Tensor from_values(DType type, const Shape &shape, const std::vector<double> &values) {
    Tensor t(type, shape);
    if (int64_t(values.size()) != t.count())
        throw std::logic_error("values do not fill the shape");
    for (int64_t i = 0; i < t.count(); ++i)
        t.set(i, values[size_t(i)]);
    return t;
}

// Uniform in [-scale, scale): the same numbers on every machine, up to the type's rounding.
inline Tensor random_tensor(DType type, const Shape &shape, uint32_t seed, double scale = 1) {
    std::mt19937 random(seed);
    Tensor t(type, shape);
    for (int64_t i = 0; i < t.count(); ++i)
        t.set(i, scale * (double(random()) / 2147483648.0 - 1.0));
    return t;
}

// int8 weights and scales, one for each row or each column.
struct ScaledTensor {
    Tensor w, scales;
    // What they stand for.
    Tensor product(DType type) const {
        Tensor t(type, w.shape);
        t.constant = w.constant;
        const bool of_rows = scales.shape[1] == 1;
        for (int64_t i = 0; i < t.count(); ++i)
            t.set(i, w.at(i) * scales.at(of_rows ? i / w.shape[1] : i % w.shape[1]));
        return t;
    }
};
inline ScaledTensor random_scaled(const Shape &shape, uint32_t seed, bool of_rows,
                                  double scale = 1) {
    std::mt19937 random(seed);
    const Shape scales = of_rows ? Shape{shape[0], 1} : Shape{1, shape[1]};
    ScaledTensor r{Tensor(DType::i8, shape), Tensor(DType::f32, scales)};
    for (int64_t i = 0; i < r.w.count(); ++i)
        r.w.set(i, double(int32_t(random() % 255) - 127));
    for (int64_t i = 0; i < r.scales.count(); ++i)
        r.scales.set(i, scale * (0.25 + double(random()) / 4294967296.0) / 127);
    r.w = r.w.frozen();
    r.scales = r.scales.frozen();
    return r;
}

// Integers in [low, high).
inline Tensor random_ids(const Shape &shape, uint32_t seed, int32_t low, int32_t high) {
    std::mt19937 random(seed);
    Tensor t(DType::i32, shape);
    for (int64_t i = 0; i < t.count(); ++i)
        t.as<int32_t>()[i] = low + int32_t(random() % uint32_t(high - low));
    return t;
}

// ||a - b|| / ||b||; infinite when a number is not finite or the sizes differ.
inline double relative_error(const Tensor &a, const Tensor &b) {
    if (a.count() != b.count())
        return INFINITY;
    double difference = 0, norm = 0;
    for (int64_t i = 0; i < a.count(); ++i) {
        const double x = a.at(i), y = b.at(i);
        if (!std::isfinite(x) || !std::isfinite(y))
            return INFINITY;
        difference += (x - y) * (x - y);
        norm += y * y;
    }
    if (difference == 0)
        return 0;
    return std::sqrt(difference / std::max(norm, 1e-300));
}

// Bit for bit.
inline bool identical(const Tensor &a, const Tensor &b) {
    return a.type == b.type && a.shape == b.shape &&
           std::memcmp(a.block->data(), b.block->data(), a.block->size()) == 0;
}

// What an output looks like; DType::none leaves an optional one out.
struct Out {
    DType type = DType::none;
    Shape shape;
};

class NoKernel : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// One device of a backend.
class OpRunner {
public:
    explicit OpRunner(const ponder_backend *backend) : backend_(backend) {
        char why[256] = "";
        if (!backend->probe(why, sizeof why))
            throw std::runtime_error(std::string(backend->name) + " cannot run here: " + why);
        host_.struct_size = sizeof host_;
        host_.workers = 1;
        host_.allocate = [](void *, size_t size, size_t alignment) -> void * {
            return std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
        };
        host_.release = [](void *, void *block) { std::free(block); };
        host_.log = [](void *, int32_t, const char *) {};
        device_ = backend->open(&host_, why, sizeof why);
        if (!device_)
            throw std::runtime_error(std::string(backend->name) + " does not open: " + why);
    }
    ~OpRunner() {
        for (const auto &[block, buffer] : resident_)
            backend_->release(device_, buffer);
        backend_->close(device_);
    }
    OpRunner(const OpRunner &) = delete;
    OpRunner &operator=(const OpRunner &) = delete;

    // Independent tasks (PONDER_TILE_ANY, PONDER_TILE_ROWS) from the last to the first.
    bool reversed = false;
    // Of the last call.
    ponder_plan plan{};

    // PONDER_PLAN_OK, _NONE or _FAILED, the reason in `why`.
    int32_t try_run(const std::string &op, const std::vector<Tensor> &in,
                    const std::vector<Out> &out, const std::vector<double> &attr,
                    std::vector<Tensor> &results, std::string &why, uint32_t version = 1) {
        std::vector<Tensor> all = in;
        for (const Out &o : out)
            all.push_back(o.type == DType::none ? Tensor() : Tensor(o.type, o.shape));
        std::vector<ponder_tensor> description(all.size());
        for (size_t i = 0; i < all.size(); ++i) {
            description[i].dtype = int32_t(all[i].type);
            description[i].rank = int32_t(all[i].shape.size());
            std::copy(all[i].shape.begin(), all[i].shape.end(), description[i].dim);
        }
        std::vector<const void *> constant(in.size(), nullptr);
        for (size_t i = 0; i < in.size(); ++i)
            if (in[i].constant) {
                constant[i] = in[i].block->data();
                kept_.push_back(in[i]);
            }
        ponder_op_call call{};
        call.struct_size = sizeof call;
        call.version = version;
        call.op = op.c_str();
        call.n_in = uint32_t(in.size());
        call.n_out = uint32_t(out.size());
        call.n_attr = uint32_t(attr.size());
        call.tensor = description.data();
        call.constant = constant.data();
        call.attr = attr.data();

        plan = {};
        plan.struct_size = sizeof plan;
        char text[512] = "";
        const int32_t answer = backend_->plan(device_, &call, &plan, text, sizeof text);
        why = text;
        if (answer != PONDER_PLAN_OK)
            return answer;

        std::vector<void *> buffers(all.size(), nullptr);
        for (size_t i = 0; i < all.size(); ++i)
            if (all[i].block)
                buffers[i] = buffer_of(all[i]);
        const Block workspace(plan.workspace);
        void *scratch = workspace.data();
        if (!backend_->host_memory) {
            scratch = backend_->allocate(device_, workspace.size());
            if (!scratch ||
                backend_->upload(device_, scratch, workspace.data(), workspace.size()) != 0)
                throw std::runtime_error("device memory");
        }
        for (uint32_t i = 0; i < plan.tasks; ++i)
            backend_->run(plan.kernel, buffers.data(), scratch, reversed ? plan.tasks - 1 - i : i);
        if (!backend_->host_memory) {
            if (backend_->synchronize(device_) != 0)
                throw std::runtime_error(op + ": " + backend_->problem(device_));
            backend_->release(device_, scratch);
        }
        if (backend_->drop)
            backend_->drop(plan.kernel);
        results.assign(all.begin() + int64_t(in.size()), all.end());
        if (!backend_->host_memory)
            bring_back(all, buffers, in.size());
        return answer;
    }

    std::vector<Tensor> run(const std::string &op, const std::vector<Tensor> &in,
                            const std::vector<Out> &out, const std::vector<double> &attr = {}) {
        std::vector<Tensor> results;
        std::string why;
        const int32_t answer = try_run(op, in, out, attr, results, why);
        if (answer == PONDER_PLAN_NONE)
            throw NoKernel(op);
        if (answer != PONDER_PLAN_OK)
            throw std::runtime_error(op + ": " + why);
        return results;
    }

    // The data of a constant has changed.
    void refresh(const Tensor &constant) {
        for (const auto &[block, buffer] : resident_)
            if (block == constant.block &&
                backend_->upload(device_, buffer, block->data(), block->size()) != 0)
                throw std::runtime_error("upload");
        if (backend_->refresh)
            backend_->refresh(device_, constant.block->data());
    }
    // The constant goes: its data may become another's.
    void forget(const Tensor &constant) {
        std::erase_if(resident_, [&](const auto &entry) {
            if (entry.first != constant.block)
                return false;
            backend_->release(device_, entry.second);
            return true;
        });
        if (backend_->forget)
            backend_->forget(device_, constant.block->data());
    }
    size_t packed_bytes() const { return backend_->packed_bytes(device_); }

private:
    void *buffer_of(const Tensor &t) {
        if (backend_->host_memory)
            return t.block->data();
        for (const auto &[block, buffer] : resident_)
            if (t.constant && block == t.block)
                return buffer;
        void *buffer = backend_->allocate(device_, t.block->size());
        if (!buffer || backend_->upload(device_, buffer, t.block->data(), t.block->size()) != 0)
            throw std::runtime_error("device memory");
        if (t.constant)
            resident_.emplace_back(t.block, buffer);
        return buffer;
    }
    void bring_back(const std::vector<Tensor> &all, const std::vector<void *> &buffers,
                    size_t first_out) {
        for (size_t i = 0; i < all.size(); ++i) {
            if (!all[i].block || all[i].constant)
                continue;
            if (i >= first_out && backend_->download(device_, all[i].block->data(), buffers[i],
                                                     all[i].block->size()) != 0)
                throw std::runtime_error("download");
            backend_->release(device_, buffers[i]);
        }
    }

    const ponder_backend *backend_;
    ponder_backend_host host_{};
    ponder_device *device_ = nullptr;
    std::vector<Tensor> kept_; // constants outlive the device
    std::vector<std::pair<std::shared_ptr<Block>, void *>> resident_;
};

// One call on a device of its own.
inline std::vector<Tensor> run_op(const ponder_backend *backend, const std::string &op,
                                  const std::vector<Tensor> &in, const std::vector<Out> &out,
                                  const std::vector<double> &attr = {}) {
    return OpRunner(backend).run(op, in, out, attr);
}

} // namespace ponder::test

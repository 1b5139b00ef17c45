// safetensors files: 8 bytes little-endian header length, JSON header, data.
// https://github.com/huggingface/safetensors (format description)
#pragma once

#include "base/dtype.hpp"
#include "base/file.hpp"

#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace ponder {

struct TensorInfo {
    std::string name;
    std::string dtype; // as in the file: "F32", "BF16", ...
    std::vector<int64_t> shape;
    uint64_t begin = 0, end = 0; // absolute offsets in the source
    uint64_t count() const;      // elements
};

std::string shape_text(const std::vector<int64_t> &shape); // "[2, 3]", for messages

// A parsed header over a file or a block of memory. Everything is checked while parsing: no
// overlap, no gap, sizes equal to shape x dtype and within the source.
class SafeTensors {
public:
    static SafeTensors open(const std::string &path);
    // `name` stands for the path in messages; the memory must outlive the object.
    static SafeTensors view(std::span<const std::byte> memory, const std::string &name);

    const std::string &name() const { return name_; }
    const std::map<std::string, TensorInfo> &tensors() const { return tensors_; }
    const std::map<std::string, std::string> &metadata() const { return metadata_; }
    const TensorInfo *find(const std::string &tensor) const;
    // Reads and converts to `type` (f32, f64, bf16, i32 from I32, i8 from I8); F16, BF16, F32, F64
    // convert among each other, I64 to i32. `shape` is what the caller needs: PONDER_E_FORMAT
    // naming file and tensor when it differs or the tensor is missing, and naming the element that
    // is NaN, infinite, or out of the range of `type`. Needs a small buffer besides `out`.
    void read(const std::string &tensor, const std::vector<int64_t> &shape, DType type,
              void *out) const;
    // The same for elements [first, first + count) of the tensor, row by row.
    void read_part(const std::string &tensor, const std::vector<int64_t> &shape, DType type,
                   uint64_t first, uint64_t count, void *out) const;
    // The bytes as stored, any dtype.
    std::vector<std::byte> raw(const std::string &tensor) const;

private:
    void parse(uint64_t size);
    void copy(uint64_t offset, void *out, size_t size) const;

    std::string name_;
    std::map<std::string, TensorInfo> tensors_;
    std::map<std::string, std::string> metadata_;
    std::shared_ptr<const File> file_;
    std::span<const std::byte> memory_;
};

// Collects tensors (not copied) and writes them in order, data 64-byte aligned.
class SafeTensorsWriter {
public:
    std::map<std::string, std::string> metadata;
    // dtype f32, f64, bf16, i32, i8, or U8 as raw bytes (DType::none). Names are unique, not empty
    // and without control characters, else PONDER_E_INTERNAL.
    void add(const std::string &name, DType type, const std::vector<int64_t> &shape,
             const void *data);
    uint64_t size() const;
    void write(const Sink &sink) const;

private:
    struct Entry {
        std::string name;
        DType type;
        std::vector<int64_t> shape;
        const void *data;
        uint64_t bytes;
    };
    std::string header() const;
    std::vector<Entry> entries_;
};

} // namespace ponder

#include "formats/safetensors.hpp"

#include "base/error.hpp"
#include "base/json.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace ponder {

static_assert(std::endian::native == std::endian::little, "tensor data is little-endian");

namespace {

using ULL = unsigned long long; // for %llu

constexpr uint64_t header_limit = 64u << 20;
constexpr size_t header_values_limit = 1u << 20;
constexpr int header_depth = 4;
constexpr size_t rank_limit = 8;
constexpr size_t name_limit = 1024;
constexpr size_t block_elements = 32u << 10;
constexpr size_t data_alignment = 64;

struct StoredType {
    const char *name;
    size_t bytes;
};
constexpr StoredType stored_types[] = {
    {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1},
    {"I16", 2},  {"U16", 2}, {"F16", 2}, {"BF16", 2},    {"I32", 4},     {"U32", 4},
    {"F32", 4},  {"I64", 8}, {"U64", 8}, {"F64", 8},     {"C64", 8},
};

size_t stored_size(const std::string &dtype) {
    for (const StoredType &type : stored_types)
        if (dtype == type.name)
            return type.bytes;
    return 0;
}

const char *stored_name(DType type) {
    switch (type) {
    case DType::f32:
        return "F32";
    case DType::bf16:
        return "BF16";
    case DType::f64:
        return "F64";
    case DType::i32:
        return "I32";
    case DType::i8:
        return "I8";
    default:
        return "U8";
    }
}

bool is_usable_name(const std::string &name) {
    if (name.empty() || name.size() > name_limit)
        return false;
    return std::none_of(name.begin(), name.end(),
                        [](char c) { return (c >= 0 && c < ' ') || c == 127; });
}

// False when a dimension is negative or the product of the non-zero ones leaves int64. The order
// of the dimensions must not matter, so zeros do not hide an overflow.
bool checked_count(const std::vector<int64_t> &shape, uint64_t &count) {
    int64_t product = 1;
    bool empty = false;
    for (int64_t size : shape) {
        if (size < 0)
            return false;
        if (size == 0)
            empty = true;
        else if (__builtin_mul_overflow(product, size, &product))
            return false;
    }
    count = empty ? 0 : uint64_t(product);
    return true;
}

// One entry of the header: its field values checked one by one, offsets still relative to the data.
class EntryReader {
public:
    EntryReader(const std::string &file, const std::string &name, const json::Value &entry)
        : file_(file), name_(name), entry_(entry) {}

    TensorInfo read() const {
        if (!is_usable_name(name_))
            throw_error(PONDER_E_FORMAT,
                        "%s: tensor name at offset %zu is empty, longer than %zu bytes or has "
                        "control characters",
                        file_.c_str(), entry_.offset, name_limit);
        if (entry_.type != json::Type::object)
            fail("entry", entry_, "is no object");
        for (const auto &[key, value] : entry_.members)
            if (key != "dtype" && key != "shape" && key != "data_offsets")
                fail(json::shown(key).c_str(), value, "is no known field");
        TensorInfo info;
        info.name = name_;
        const json::Value &dtype = field("dtype", json::Type::string);
        info.dtype = dtype.string;
        size_t element = stored_size(info.dtype);
        if (element == 0)
            fail("dtype", dtype, "is unknown");

        const json::Value &shape = field("shape", json::Type::array);
        info.shape = numbers("shape", shape);
        if (info.shape.size() > rank_limit)
            fail("shape", shape, "has more than 8 dimensions");
        uint64_t count, bytes;
        if (!checked_count(info.shape, count) || __builtin_mul_overflow(count, element, &bytes))
            fail("shape", shape, "is too large");

        const json::Value &offsets = field("data_offsets", json::Type::array);
        std::vector<int64_t> range = numbers("data_offsets", offsets);
        if (range.size() != 2 || range[0] > range[1])
            fail("data_offsets", offsets, "is not [begin, end]");
        info.begin = uint64_t(range[0]);
        info.end = uint64_t(range[1]);
        if (info.end - info.begin != bytes)
            throw_error(PONDER_E_FORMAT,
                        "%s: tensor %s: data_offsets at offset %zu span %llu bytes, shape "
                        "and dtype need %llu",
                        file_.c_str(), json::shown(name_).c_str(), offsets.offset,
                        ULL(info.end - info.begin), ULL(bytes));
        return info;
    }

private:
    [[noreturn]] void fail(const char *key, const json::Value &value, const char *problem) const {
        throw_error(PONDER_E_FORMAT, "%s: tensor %s: %s %s (at offset %zu)", file_.c_str(),
                    json::shown(name_).c_str(), key, problem, value.offset);
    }

    const json::Value &field(const char *key, json::Type type) const {
        const json::Value *value = entry_.find(key);
        if (!value)
            fail(key, entry_, "is missing");
        if (value->type != type)
            fail(key, *value, "has the wrong JSON type");
        return *value;
    }

    std::vector<int64_t> numbers(const char *key, const json::Value &array) const {
        std::vector<int64_t> result;
        for (const json::Value &item : array.items) {
            if (item.type != json::Type::integer || item.integer < 0)
                fail(key, item, "has an item that is no integer in 0 .. 2^63-1");
            result.push_back(item.integer);
        }
        return result;
    }

    const std::string &file_;
    const std::string &name_;
    const json::Value &entry_;
};

// The format forbids overlaps and holes; together with the sizes this leaves one way to read it.
void check_coverage(const std::string &file, const std::map<std::string, TensorInfo> &tensors,
                    uint64_t data_begin, uint64_t source_size) {
    std::vector<const TensorInfo *> order;
    for (const auto &[name, info] : tensors)
        order.push_back(&info);
    std::sort(order.begin(), order.end(), [](const TensorInfo *a, const TensorInfo *b) {
        return a->begin != b->begin ? a->begin < b->begin : a->end < b->end;
    });
    uint64_t position = data_begin;
    for (const TensorInfo *info : order) {
        const char *problem = info->begin < position    ? "overlaps another one"
                              : info->begin > position  ? "follows a hole"
                              : info->end > source_size ? "ends after the file"
                                                        : nullptr;
        if (problem)
            throw_error(PONDER_E_FORMAT,
                        "%s: tensor %s %s: data_offsets are file offsets %llu to %llu, "
                        "expected begin %llu, end at most %llu",
                        file.c_str(), json::shown(info->name).c_str(), problem, ULL(info->begin),
                        ULL(info->end), ULL(position), ULL(source_size));
        position = info->end;
    }
    if (position != source_size)
        throw_error(PONDER_E_FORMAT, "%s: data from offset %llu to %llu belongs to no tensor",
                    file.c_str(), ULL(position), ULL(source_size));
}

float half_to_float(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000u) << 16, exponent = (half >> 10) & 31u;
    uint32_t fraction = half & 0x3ffu;
    if (exponent == 0) { // subnormal: fraction * 2^-24 is exact
        float magnitude = float(fraction) * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    exponent = exponent == 31 ? 255 : exponent + 112;
    return std::bit_cast<float>(sign | (exponent << 23) | (fraction << 13));
}

struct F16 {
    uint16_t bits;
};

double widen(float x) { return x; }
double widen(double x) { return x; }
double widen(bf16 x) { return to_float(x); }
double widen(F16 x) { return half_to_float(x.bits); }

void narrow(double x, float &out) { out = float(x); }
void narrow(double x, double &out) { out = x; }
void narrow(double x, bf16 &out) { out = to_bf16(float(x)); }

// A branch per element would keep the compiler from vectorising the check.
bool all_finite(const float *x, size_t count) {
    uint32_t bad = 0;
    for (size_t i = 0; i < count; ++i)
        bad |= (std::bit_cast<uint32_t>(x[i]) & 0x7f800000u) == 0x7f800000u;
    return !bad;
}
bool all_finite(const bf16 *x, size_t count) {
    uint16_t bad = 0;
    for (size_t i = 0; i < count; ++i)
        bad |= (x[i].bits & 0x7f80u) == 0x7f80u;
    return !bad;
}
bool all_finite(const double *x, size_t count) {
    uint64_t bad = 0;
    for (size_t i = 0; i < count; ++i)
        bad |= (std::bit_cast<uint64_t>(x[i]) & 0x7ff0000000000000u) == 0x7ff0000000000000u;
    return !bad;
}

// `blocks(first, count, buffer)` copies stored elements; results go to `out`. Returns the index
// of the first element that the type of `out` cannot hold as a finite number, or `count`.
template <class Stored, class Result, class Blocks>
uint64_t convert_floats(uint64_t count, Result *out, const Blocks &blocks) {
    std::vector<Stored> buffer(
        std::is_same_v<Stored, Result> ? 0 : size_t(std::min<uint64_t>(count, block_elements)));
    for (uint64_t first = 0; first < count; first += block_elements) {
        size_t part = size_t(std::min<uint64_t>(block_elements, count - first));
        Result *to = out + first;
        if constexpr (std::is_same_v<Stored, Result>) {
            blocks(first, part, to);
        } else {
            blocks(first, part, buffer.data());
            for (size_t i = 0; i < part; ++i)
                narrow(widen(buffer[i]), to[i]);
        }
        if (all_finite(to, part))
            continue;
        for (size_t i = 0; i < part; ++i)
            if (!std::isfinite(widen(to[i])))
                return first + i;
    }
    return count;
}

template <class Stored, class Blocks>
uint64_t convert_integers(uint64_t count, int32_t *out, const Blocks &blocks) {
    std::vector<Stored> buffer(size_t(std::min<uint64_t>(count, block_elements)));
    for (uint64_t first = 0; first < count; first += block_elements) {
        size_t part = size_t(std::min<uint64_t>(block_elements, count - first));
        blocks(first, part, buffer.data());
        for (size_t i = 0; i < part; ++i) {
            if (buffer[i] < INT32_MIN || buffer[i] > INT32_MAX)
                return first + i;
            out[first + i] = int32_t(buffer[i]);
        }
    }
    return count;
}

template <class Result, class Blocks>
bool convert_to_float(const std::string &dtype, uint64_t count, void *out, const Blocks &blocks,
                      uint64_t &done) {
    auto *to = static_cast<Result *>(out);
    if (dtype == "F32")
        done = convert_floats<float>(count, to, blocks);
    else if (dtype == "BF16")
        done = convert_floats<bf16>(count, to, blocks);
    else if (dtype == "F16")
        done = convert_floats<F16>(count, to, blocks);
    else if (dtype == "F64")
        done = convert_floats<double>(count, to, blocks);
    else
        return false;
    return true;
}

template <class Blocks>
bool convert(const std::string &dtype, DType type, uint64_t count, void *out, const Blocks &blocks,
             uint64_t &done) {
    switch (type) {
    case DType::f32:
        return convert_to_float<float>(dtype, count, out, blocks, done);
    case DType::f64:
        return convert_to_float<double>(dtype, count, out, blocks, done);
    case DType::bf16:
        return convert_to_float<bf16>(dtype, count, out, blocks, done);
    case DType::i32:
        if (dtype == "I32")
            done = convert_integers<int32_t>(count, static_cast<int32_t *>(out), blocks);
        else if (dtype == "I64")
            done = convert_integers<int64_t>(count, static_cast<int32_t *>(out), blocks);
        else
            return false;
        return true;
    case DType::i8:
        if (dtype != "I8")
            return false;
        blocks(0, size_t(count), static_cast<int8_t *>(out));
        done = count;
        return true;
    default:
        return false;
    }
}

} // namespace

uint64_t TensorInfo::count() const {
    uint64_t result = 1;
    for (int64_t size : shape)
        result *= uint64_t(size);
    return result;
}

std::string shape_text(const std::vector<int64_t> &shape) {
    std::string text = "[";
    for (int64_t size : shape)
        text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    return text + "]";
}

SafeTensors SafeTensors::open(const std::string &path) {
    SafeTensors result;
    result.name_ = path;
    result.file_ = std::make_shared<const File>(path);
    result.parse(result.file_->size());
    return result;
}

SafeTensors SafeTensors::view(std::span<const std::byte> memory, const std::string &name) {
    SafeTensors result;
    result.name_ = name;
    result.memory_ = memory;
    result.parse(memory.size());
    return result;
}

void SafeTensors::copy(uint64_t offset, void *out, size_t size) const {
    if (size == 0)
        return;
    if (file_)
        file_->read(offset, out, size);
    else
        std::memcpy(out, memory_.data() + offset, size);
}

void SafeTensors::parse(uint64_t size) {
    uint64_t length = 0;
    if (size < sizeof length)
        throw_error(PONDER_E_FORMAT, "%s: %llu bytes, too short for a header length at offset 0",
                    name_.c_str(), ULL(size));
    copy(0, &length, sizeof length);
    if (length == 0 || length > header_limit || length > size - sizeof length)
        throw_error(PONDER_E_FORMAT,
                    "%s: header length %llu at offset 0 is not in 1 .. %llu (file of %llu bytes)",
                    name_.c_str(), ULL(length), ULL(std::min(header_limit, size - sizeof length)),
                    ULL(size));
    uint64_t data_begin = sizeof length + length;
    std::string text(size_t(length), '\0');
    copy(sizeof length, text.data(), text.size());
    if (text[0] != '{')
        throw_error(PONDER_E_FORMAT, "%s: header at offset 8 does not begin with {", name_.c_str());
    json::Limits limits;
    limits.bytes = header_limit;
    limits.depth = header_depth;
    limits.values = header_values_limit;
    limits.offset = sizeof length;
    json::Value header = json::parse(text, name_, limits);

    for (const auto &[name, entry] : header.members) {
        if (name == "__metadata__") {
            if (entry.type != json::Type::object)
                throw_error(PONDER_E_FORMAT, "%s: __metadata__ at offset %zu is no object",
                            name_.c_str(), entry.offset);
            for (const auto &[key, value] : entry.members) {
                if (value.type != json::Type::string)
                    throw_error(PONDER_E_FORMAT, "%s: __metadata__ %s at offset %zu is no string",
                                name_.c_str(), json::shown(key).c_str(), value.offset);
                metadata_.emplace(key, value.string);
            }
            continue;
        }
        TensorInfo info = EntryReader(name_, name, entry).read();
        // Both are below 2^63, the header below 2^27: no overflow.
        info.begin += data_begin;
        info.end += data_begin;
        tensors_.emplace(name, std::move(info));
    }
    check_coverage(name_, tensors_, data_begin, size);
}

const TensorInfo *SafeTensors::find(const std::string &tensor) const {
    auto found = tensors_.find(tensor);
    return found == tensors_.end() ? nullptr : &found->second;
}

void SafeTensors::read(const std::string &tensor, const std::vector<int64_t> &shape, DType type,
                       void *out) const {
    const TensorInfo *info = find(tensor);
    read_part(tensor, shape, type, 0, info ? info->count() : 0, out);
}

void SafeTensors::read_part(const std::string &tensor, const std::vector<int64_t> &shape,
                            DType type, uint64_t begin, uint64_t count, void *out) const {
    const TensorInfo *info = find(tensor);
    if (!info)
        throw_error(PONDER_E_FORMAT, "%s: tensor %s is missing", name_.c_str(),
                    json::shown(tensor).c_str());
    if (info->shape != shape)
        throw_error(PONDER_E_FORMAT, "%s: tensor %s has shape %s, expected %s", name_.c_str(),
                    json::shown(tensor).c_str(), shape_text(info->shape).c_str(),
                    shape_text(shape).c_str());
    if (begin > info->count() || count > info->count() - begin)
        throw_error(PONDER_E_INTERNAL, "%s: tensor %s: a part outside it", name_.c_str(),
                    json::shown(tensor).c_str());
    uint64_t done = 0;
    auto blocks = [&](uint64_t first, size_t part, auto *to) {
        copy(info->begin + (begin + first) * sizeof *to, to, part * sizeof *to);
    };
    if (!convert(info->dtype, type, count, out, blocks, done))
        throw_error(PONDER_E_FORMAT, "%s: tensor %s is stored as %s, needed as %s", name_.c_str(),
                    json::shown(tensor).c_str(), info->dtype.c_str(), stored_name(type));
    if (done != count)
        throw_error(PONDER_E_FORMAT,
                    "%s: tensor %s: element %llu (at offset %llu) is not finite or out of "
                    "the range of %s",
                    name_.c_str(), json::shown(tensor).c_str(), ULL(begin + done),
                    ULL(info->begin + (begin + done) * stored_size(info->dtype)),
                    stored_name(type));
}

std::vector<std::byte> SafeTensors::raw(const std::string &tensor) const {
    const TensorInfo *info = find(tensor);
    if (!info)
        throw_error(PONDER_E_FORMAT, "%s: tensor %s is missing", name_.c_str(),
                    json::shown(tensor).c_str());
    std::vector<std::byte> bytes(size_t(info->end - info->begin));
    copy(info->begin, bytes.data(), bytes.size());
    return bytes;
}

void SafeTensorsWriter::add(const std::string &name, DType type, const std::vector<int64_t> &shape,
                            const void *data) {
    uint64_t count, bytes;
    size_t element = type == DType::none ? 1 : size_of(type);
    bool taken = std::any_of(entries_.begin(), entries_.end(),
                             [&](const Entry &entry) { return entry.name == name; });
    if (taken || name == "__metadata__" || !is_usable_name(name) || shape.size() > rank_limit ||
        !checked_count(shape, count) || __builtin_mul_overflow(count, element, &bytes))
        throw_error(PONDER_E_INTERNAL, "tensor %s of shape %s cannot be stored",
                    json::shown(name).c_str(), shape_text(shape).c_str());
    entries_.push_back({name, type, shape, data, bytes});
}

std::string SafeTensorsWriter::header() const {
    std::string text = "{";
    if (!metadata.empty()) {
        text += "\"__metadata__\":{";
        for (const auto &[key, value] : metadata) {
            if (text.back() != '{')
                text += ',';
            text += json::quote(key) + ':' + json::quote(value);
        }
        text += '}';
    }
    uint64_t position = 0;
    for (const Entry &entry : entries_) {
        if (text.size() > 1)
            text += ',';
        text += json::quote(entry.name) + ":{\"dtype\":\"" + stored_name(entry.type) +
                "\",\"shape\":" + shape_text(entry.shape) + ",\"data_offsets\":[" +
                std::to_string(position) + "," + std::to_string(position + entry.bytes) + "]}";
        position += entry.bytes;
    }
    text += "}";
    size_t unaligned = (sizeof(uint64_t) + text.size()) % data_alignment;
    if (unaligned)
        text.append(data_alignment - unaligned, ' ');
    return text;
}

uint64_t SafeTensorsWriter::size() const {
    uint64_t total = sizeof(uint64_t) + header().size();
    for (const Entry &entry : entries_)
        total += entry.bytes;
    return total;
}

void SafeTensorsWriter::write(const Sink &sink) const {
    std::string text = header();
    uint64_t length = text.size();
    sink(&length, sizeof length);
    sink(text.data(), text.size());
    for (const Entry &entry : entries_)
        if (entry.bytes > 0)
            sink(entry.data, size_t(entry.bytes));
}

} // namespace ponder

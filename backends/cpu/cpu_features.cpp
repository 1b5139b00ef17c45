// CPUID says what the processor has, XCR0 which registers the system saves: both are needed.
#include "cpu_features.hpp"

#include <cpuid.h>
#include <cstdlib>
#include <cstring>

namespace ponder::cpu {
namespace {

struct Features {
    bool avx2 = false, avx512 = false, avx512_bf16 = false;
};

uint64_t saved_registers() {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t(high) << 32 | low;
}

Features detect() {
    Features f;
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d))
        return f;
    const bool xsave = c >> 27 & 1, avx = c >> 28 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
    const bool movbe = c >> 22 & 1, popcnt = c >> 23 & 1;
    if (!xsave || !avx || !fma || !f16c || !movbe || !popcnt)
        return f;
    const uint64_t saved = saved_registers();
    if ((saved & 0x6) != 0x6)
        return f;
    if (!__get_cpuid_count(0x80000001, 0, &a, &b, &c, &d))
        return f;
    const bool lzcnt = c >> 5 & 1;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return f;
    const uint32_t highest = a;
    const bool bmi = (b >> 3 & 1) && (b >> 8 & 1);
    f.avx2 = (b >> 5 & 1) && bmi && lzcnt;
    // F, DQ, CD, BW, VL: what x86-64-v4 means.
    const uint32_t v4 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;
    f.avx512 = f.avx2 && (b & v4) == v4 && (saved & 0xe0) == 0xe0;
    if (highest >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d))
        f.avx512_bf16 = f.avx512 && (a >> 5 & 1);
    return f;
}

} // namespace

const Isa *best_isa() {
    const Features f = detect();
    const char *wish = std::getenv("PONDER_CPU_ISA");
    const auto allowed = [&](const char *highest_of[], int n) {
        if (!wish || !*wish)
            return true;
        for (int i = 0; i < n; ++i)
            if (std::strcmp(wish, highest_of[i]) == 0)
                return true;
        return false;
    };
    const char *bf16[] = {"avx512_bf16"}, *v4[] = {"avx512_bf16", "avx512"};
    if (f.avx512_bf16 && allowed(bf16, 1))
        return &avx512_bf16::isa;
    if (f.avx512 && allowed(v4, 2))
        return &avx512::isa;
    if (f.avx2)
        return &avx2::isa;
    return nullptr;
}

} // namespace ponder::cpu

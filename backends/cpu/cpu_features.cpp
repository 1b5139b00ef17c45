// CPUID says what the processor has, XCR0 which registers the system saves: both are needed.
#include "cpu_features.hpp"

#include <cpuid.h>
#include <cstdlib>
#include <cstring>
#include <sys/syscall.h>
#include <unistd.h>

namespace ponder::cpu {
namespace {

// Each level includes those before it.
enum Level { none, level_avx2, level_avx512, level_avx512_bf16, level_amx_bf16 };

uint64_t saved_registers() {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t(high) << 32 | low;
}

// Linux gives tile registers to a process that asks; asking again does no harm.
bool tiles_granted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

Level detect() {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d))
        return none;
    // FMA, MOVBE, POPCNT, OSXSAVE, AVX, F16C
    const uint32_t v3 = 1u << 12 | 1u << 22 | 1u << 23 | 1u << 27 | 1u << 28 | 1u << 29;
    if ((c & v3) != v3)
        return none;
    const uint64_t saved = saved_registers();
    if ((saved & 0x6) != 0x6)
        return none;
    if (!__get_cpuid(0x80000001, &a, &b, &c, &d) || !(c >> 5 & 1)) // LZCNT
        return none;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return none;
    const uint32_t v3_more = 1u << 3 | 1u << 5 | 1u << 8; // BMI1, AVX2, BMI2
    if ((b & v3_more) != v3_more)
        return none;
    const uint32_t v4 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31; // F, DQ, CD, BW, VL
    if ((b & v4) != v4 || (saved & 0xe0) != 0xe0)
        return level_avx2;
    const uint32_t tiles = 1u << 22 | 1u << 24; // AMX-BF16, AMX-TILE
    const bool amx = (d & tiles) == tiles && (saved & 0x60000) == 0x60000;
    if (a < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1))
        return level_avx512;
    return amx ? level_amx_bf16 : level_avx512_bf16;
}

} // namespace

const Isa *best_isa() {
    static constexpr const Isa *levels[] = {nullptr, &avx2::isa, &avx512::isa, &avx512_bf16::isa,
                                            &amx_bf16::isa};
    int level = detect();
    if (const char *wish = secure_getenv("PONDER_CPU_ISA"))
        for (int i = level - 1; i > 0; --i)
            if (std::strcmp(wish, levels[i]->name) == 0)
                level = i;
    if (level == level_amx_bf16 && !tiles_granted())
        level = level_avx512_bf16;
    while (level > none && levels[level]->op_count == 0)
        --level;
    return levels[level];
}

} // namespace ponder::cpu

// Which of the compiled instruction sets the processor and the system allow.
#pragma once

#include "device.hpp"

namespace ponder::cpu {

// The best one, NULL if there is none. PONDER_CPU_ISA=avx2|avx512|avx512_bf16 asks for less.
const Isa *best_isa();

namespace avx2 {
extern const Isa isa;
}
namespace avx512 {
extern const Isa isa;
}
namespace avx512_bf16 {
extern const Isa isa;
}

} // namespace ponder::cpu

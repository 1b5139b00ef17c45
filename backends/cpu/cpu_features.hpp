// Which of the compiled instruction sets the processor and the system allow.
#pragma once

#include "device.hpp"

namespace ponder::cpu {

// The best one, NULL if there is none. PONDER_CPU_ISA=avx2, avx512 or avx512_bf16 asks for less.
// Where it is amx_bf16, this asks the system for the tile registers.
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
namespace amx_bf16 {
extern const Isa isa;
}

} // namespace ponder::cpu

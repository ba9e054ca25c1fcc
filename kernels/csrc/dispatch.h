// Run-time choice of the instruction set. Each kernel family is compiled once per set and exports one table of functions.
#pragma once

namespace zk {

enum class Isa { generic = 0, avx2 = 1, avx512 = 2 };

Isa best_isa();              // what this processor and this build offer
Isa active_isa();            // best_isa() unless set
bool isa_available(Isa isa);
void set_isa(Isa isa);       // for tests; the caller checks isa_available first
const char* isa_name(Isa isa);

// Pick the active table out of NAME_generic, NAME_avx2, NAME_avx512 (those that this build has).
#if defined(ZK_HAVE_avx512)
#define ZK_PICK(NAME)                                   \
  (zk::active_isa() == zk::Isa::avx512 ? NAME##_avx512  \
   : zk::active_isa() == zk::Isa::avx2 ? NAME##_avx2    \
                                       : NAME##_generic)
#else
#define ZK_PICK(NAME) (NAME##_generic)
#endif

}  // namespace zk

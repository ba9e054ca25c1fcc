#include "bindings.h"

void bind_attention(nanobind::module_&) {}

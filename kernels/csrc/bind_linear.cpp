#include "bindings.h"

void bind_linear(nanobind::module_&) {}

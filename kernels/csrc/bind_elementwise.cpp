#include "bindings.h"

void bind_elementwise(nanobind::module_&) {}

#include "bindings.h"

void bind_sampling(nanobind::module_&) {}

// One binding function per kernel family (bind_*.cpp). Bindings check shapes, release the GIL and call the active table.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>

using Floats1 = nanobind::ndarray<float, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;
using Floats2 = nanobind::ndarray<float, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;
using Floats3 = nanobind::ndarray<float, nanobind::ndim<3>, nanobind::c_contig, nanobind::device::cpu>;
using Floats4 = nanobind::ndarray<float, nanobind::ndim<4>, nanobind::c_contig, nanobind::device::cpu>;
using Ints1 = nanobind::ndarray<int32_t, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;
using Ints2 = nanobind::ndarray<int32_t, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;

void bind_linear(nanobind::module_& m);
void bind_elementwise(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_moe(nanobind::module_& m);
void bind_sampling(nanobind::module_& m);
void bind_weights(nanobind::module_& m);

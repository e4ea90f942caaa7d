// What differs between the headers of the torch versions that these sources are compiled beside: 2.10 and newer.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/shim_utils.h>

// Throws where a call of torch's C interface fails. 2.10 and 2.11 have only a macro whose message names the call; 2.13
// has the other name too, and from 2.14 on that one hands on what torch itself says.
#ifdef STABLE_TORCH_ERROR_CODE_CHECK
#define TORCHCE_CHECK_TORCH(call) STABLE_TORCH_ERROR_CODE_CHECK(call)
#else
#define TORCHCE_CHECK_TORCH(call) TORCH_ERROR_CODE_CHECK(call)
#endif

// The ops of csrc/cuda as torch.ops.torchce_emulated, for CPU tensors.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>

#include "cuda/backend.h"
#include "ops.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(torchce_emulated, m) { torchce::define_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(torchce_emulated, CPU, m) { torchce::implement_ops<torchce::cuda::Backend>(m); }

// The linker's --wrap leads every allocation of the host code here, so that no output and no scratch memory starts with
// values that a kernel could get away with not writing: bytes of 0xff are NaN in every floating dtype.
extern "C" decltype(aoti_torch_empty_strided) __real_aoti_torch_empty_strided;

extern "C" AOTITorchError __wrap_aoti_torch_empty_strided(int64_t ndim, const int64_t* sizes, const int64_t* strides,
                                                          int32_t dtype, int32_t device_type, int32_t device_index,
                                                          AtenTensorHandle* tensor) {
  AOTITorchError error =
      __real_aoti_torch_empty_strided(ndim, sizes, strides, dtype, device_type, device_index, tensor);
  int64_t bytes = 0;
  void* data = nullptr;
  if (error == AOTI_TORCH_SUCCESS) error = aoti_torch_get_storage_size(*tensor, &bytes);
  if (error == AOTI_TORCH_SUCCESS) error = aoti_torch_get_data_ptr(*tensor, &data);
  if (error == AOTI_TORCH_SUCCESS && bytes > 0) std::memset(data, 0xff, bytes);
  return error;
}

#include "cuda_check.h"

namespace vmo {

CudaError::CudaError(const char* call, cudaError_t code)
    : std::runtime_error(std::string(call) + " failed: " + cudaGetErrorName(code) + " (" +
                         std::to_string(static_cast<int>(code)) +
                         "): " + cudaGetErrorString(code)) {}

void check_cuda(cudaError_t code, const char* call) {
  if (code == cudaSuccess) return;
  cudaGetLastError();
  throw CudaError(call, code);
}

DeviceGuard::DeviceGuard(int device) {
  check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
  if (previous_ == device) return;
  check_cuda(cudaSetDevice(device), "cudaSetDevice");
  changed_ = true;
}

DeviceGuard::~DeviceGuard() {
  if (changed_) cudaSetDevice(previous_);
}

Stream::Stream(int priority) {
  check_cuda(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, priority),
             "cudaStreamCreateWithPriority");
}

Stream::~Stream() { cudaStreamDestroy(stream_); }

Event::Event() {
  check_cuda(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming),
             "cudaEventCreateWithFlags");
}

Event::~Event() { cudaEventDestroy(event_); }

HostRegistration::HostRegistration(void* memory, size_t bytes) : memory_(memory) {
  check_cuda(cudaHostRegister(memory, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped),
             "cudaHostRegister");
  void* address = nullptr;
  const cudaError_t code = cudaHostGetDevicePointer(&address, memory, 0);
  if (code != cudaSuccess) {
    cudaHostUnregister(memory);
    check_cuda(code, "cudaHostGetDevicePointer");
  }
  device_address_ = static_cast<const char*>(address);
}

HostRegistration::~HostRegistration() { cudaHostUnregister(memory_); }

}  // namespace vmo

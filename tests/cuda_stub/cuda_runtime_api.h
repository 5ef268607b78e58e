// As much of the CUDA runtime as csrc/cuda uses, on the CPU: everything runs at once, in the
// calling thread. For tests of the copier's logic and of the kernel's arithmetic; it says
// nothing about streams, nor about what a GPU does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidDevice = 101,
  cudaErrorNotReady = 600,
  cudaErrorHostMemoryAlreadyRegistered = 712,
  cudaErrorHostMemoryNotRegistered = 713,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1 };
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2 };
enum { cudaHostRegisterPortable = 1, cudaHostRegisterMapped = 2 };

struct StubStream {
  int priority;
};
struct StubEvent {
  bool recorded;
};
using cudaStream_t = StubStream*;
using cudaEvent_t = StubEvent*;

struct dim3 {
  explicit dim3(unsigned width) : x(width) {}
  unsigned x;
};
struct uint4 {
  uint32_t x, y, z, w;
};

namespace cuda_stub {
struct Index {
  unsigned x = 0;
};
inline thread_local Index block, thread, grid;
inline std::map<void*, size_t> registered;
}  // namespace cuda_stub

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(threads)
#define blockIdx cuda_stub::block
#define threadIdx cuda_stub::thread
#define gridDim cuda_stub::grid

template <typename T>
T __ldcs(const T* address) {
  return *address;
}

inline const char* cudaGetErrorName(cudaError_t code) {
  return code == cudaErrorInvalidDevice ? "cudaErrorInvalidDevice" : "cudaErrorOfTheStub";
}
inline const char* cudaGetErrorString(cudaError_t) { return "said by the stub"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

inline cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int priority) {
  *stream = new StubStream{priority};
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t event, unsigned) {
  return event->recorded ? cudaSuccess : cudaErrorInvalidValue;
}

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new StubEvent{false};
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  event->recorded = true;
  return cudaSuccess;
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
  return event->recorded ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaEventQuery(event); }

inline cudaError_t cudaHostRegister(void* memory, size_t bytes, unsigned) {
  const bool added = cuda_stub::registered.emplace(memory, bytes).second;
  return added ? cudaSuccess : cudaErrorHostMemoryAlreadyRegistered;
}
inline cudaError_t cudaHostUnregister(void* memory) {
  const bool known = cuda_stub::registered.erase(memory) != 0;
  return known ? cudaSuccess : cudaErrorHostMemoryNotRegistered;
}
inline cudaError_t cudaHostGetDevicePointer(void** address, void* memory, unsigned) {
  *address = memory;
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes,
                                   cudaMemcpyKind, cudaStream_t) {
  std::memcpy(target, source, bytes);
  return cudaSuccess;
}

// One thread after the other: kernels here share nothing and wait for nobody.
template <typename Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments), dim3 blocks, dim3 threads,
                             void** parameters, size_t, cudaStream_t) {
  cuda_stub::grid.x = blocks.x;
  for (unsigned block = 0; block < blocks.x; ++block) {
    for (unsigned thread = 0; thread < threads.x; ++thread) {
      cuda_stub::block.x = block;
      cuda_stub::thread.x = thread;
      kernel(*static_cast<Arguments*>(parameters[0]));
    }
  }
  return cudaSuccess;
}

// CUDA errors as exceptions that name the call, and the few resources as RAII.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace vmo {

class CudaError : public std::runtime_error {
 public:
  CudaError(const char* call, cudaError_t code);
};

// Throws CudaError unless `code` is success. An error is taken from the runtime's last one,
// so that it is not reported again by a later call.
void check_cuda(cudaError_t code, const char* call);

// Makes `device` the thread's current one while it lives; torch's choice returns afterwards.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
  bool changed_ = false;
};

// A stream that does not synchronise with the legacy default stream.
class Stream {
 public:
  explicit Stream(int priority);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

// An event without a time.
class Event {
 public:
  Event();
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

// Memory of the caller, page-locked and mapped into the device's address space.
class HostRegistration {
 public:
  HostRegistration(void* memory, size_t bytes);
  ~HostRegistration();
  HostRegistration(const HostRegistration&) = delete;
  HostRegistration& operator=(const HostRegistration&) = delete;
  // Where kernels find it.
  const char* device_address() const { return device_address_; }

 private:
  void* memory_;
  const char* device_address_ = nullptr;
};

}  // namespace vmo

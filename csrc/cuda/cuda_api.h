// Plain C ABI of the CUDA copier, for ctypes (vllm_moe_offload/transfer/cuda_library.py).
//
// Functions that can fail return a negative number or NULL; vmo_cuda_last_error() then tells
// why, per thread. Streams are handles of the CUDA runtime or driver as integers (0: the legacy
// default stream).
#pragma once

#include <stdint.h>

#define VMO_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// Raised with every change of this file.
#define VMO_CUDA_API_VERSION 1

VMO_API int32_t vmo_cuda_api_version(void);
VMO_API const char* vmo_cuda_last_error(void);

typedef struct vmo_copier vmo_copier;

// One tensor of a record: `slot_bytes` from `record_offset` on, to slot r of the device at
// slots + r * slot_bytes.
typedef struct vmo_tensor_slots {
  uint64_t record_offset;
  uint64_t slot_bytes;
  void* slots;
} vmo_tensor_slots;

typedef struct vmo_slot_pair {
  int32_t host_slot;
  int32_t device_slot;
} vmo_slot_pair;

// Page-locks `records` [num_host_slots, record_bytes], which stays the caller's and must live
// longer than the copier.
VMO_API vmo_copier* vmo_copier_create(int32_t device, void* records, uint64_t record_bytes,
                                      int32_t num_host_slots, int32_t num_device_slots,
                                      const vmo_tensor_slots* tensors, int32_t num_tensors);
// Waits for all copies.
VMO_API void vmo_copier_destroy(vmo_copier* copier);
// 0 cudaMemcpyAsync, 1 gather kernel.
VMO_API int32_t vmo_copier_set_engine(vmo_copier* copier, int32_t engine);
// lane 0 demand, 1 prefetch. A ticket, or -1: then nothing of the call is under way.
VMO_API int32_t vmo_copier_copy(vmo_copier* copier, int32_t lane, const vmo_slot_pair* pairs,
                                int32_t num_pairs);
// 1: all copies of the ticket are complete; 0: not yet.
VMO_API int32_t vmo_copier_done(vmo_copier* copier, int32_t ticket);
VMO_API int32_t vmo_copier_wait(vmo_copier* copier, int32_t ticket);
VMO_API int32_t vmo_copier_join(vmo_copier* copier, int32_t ticket, uint64_t compute_stream);
VMO_API int32_t vmo_copier_release(vmo_copier* copier, int32_t ticket);
VMO_API int32_t vmo_copier_after_compute(vmo_copier* copier, uint64_t compute_stream);

#ifdef __cplusplus
}
#endif

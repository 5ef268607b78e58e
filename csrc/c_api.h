// Plain C ABI of the torch-free core, for ctypes and numpy (vllm_moe_offload/native.py).
//
// Functions that can fail return a negative number or NULL; vmo_last_error() then tells
// why, per thread. All pointers returned stay valid until the object is destroyed.
#pragma once

#include <stdint.h>

#define VMO_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

VMO_API const char* vmo_last_error(void);

// ---- planner -----------------------------------------------------------------------
typedef struct vmo_planner vmo_planner;

// Fields as in PlannerConfig (planner.h); order 0 score, 1 recency; scope 0 global,
// 1 per layer.
VMO_API vmo_planner* vmo_planner_create(int32_t num_layers, int32_t num_experts,
                                        int32_t num_slots, int32_t num_staging_slots,
                                        int32_t order, int32_t scope, int32_t admission);
VMO_API void vmo_planner_destroy(vmo_planner* planner);

// 1: planned; 0: does not fit at once, nothing changed; -1: error.
// `ids` holds int32 (id_bytes 4) or int64 (id_bytes 8). `info` receives
// {distinct experts, hits, misses, 0, 0}.
VMO_API int32_t vmo_planner_plan(vmo_planner* planner, int32_t layer, const void* ids,
                                 int64_t num_ids, int32_t id_bytes, uint32_t flags,
                                 int64_t info[5]);
VMO_API int32_t vmo_planner_finish(vmo_planner* planner);
// A shadow's share of a step: for each of `num_layers` layers from `first_layer` on,
// scores[layer] = scores[layer] * decay + gain[i] (gain NULL: scores stay), then plan with
// instant reads and finish. ids int32 [num_layers, ids_per_layer]; gain
// [num_layers, num_experts]. Needs num_experts staging slots. 0, or -1 on an error: layers
// before an id out of range stay planned.
VMO_API int32_t vmo_planner_drive(vmo_planner* planner, int32_t first_layer, int32_t num_layers,
                                  const int32_t* ids, int64_t ids_per_layer, const float* gain,
                                  float decay);
VMO_API int32_t vmo_planner_complete(vmo_planner* planner, int32_t slot, int32_t ok);
// Slot reserved, -1 nothing to do, -2 error.
VMO_API int32_t vmo_planner_prefetch(vmo_planner* planner, int32_t layer, int32_t expert,
                                     float value);
VMO_API int32_t vmo_planner_cancel_prefetch(vmo_planner* planner, int32_t slot);

// rows[i] = row of ids[i] for i < num_ids; rows[i] = row of ids[0] for the padding
// i in [num_ids, num_padded_ids). Same integer type in and out. Ids must be planned.
VMO_API int32_t vmo_planner_remap(const vmo_planner* planner, int32_t layer, const void* ids,
                                  int64_t num_ids, int64_t num_padded_ids, int32_t id_bytes,
                                  void* rows);

// Arrays of the current plan, capacity num_experts: 0 experts, 1 slots, 2 miss_experts,
// 3 miss_slots, 4 miss_kinds.
VMO_API const int32_t* vmo_planner_plan_array(const vmo_planner* planner, int32_t which);
// Tables [num_layers, num_experts].
VMO_API float* vmo_planner_scores(vmo_planner* planner);
VMO_API const int32_t* vmo_planner_page_table(const vmo_planner* planner);
VMO_API const uint64_t* vmo_planner_last_use(const vmo_planner* planner);
// 9 numbers in the order of struct Counters (planner.h), updated in place.
VMO_API const int64_t* vmo_planner_counters(const vmo_planner* planner);
VMO_API int32_t vmo_planner_num_resident(const vmo_planner* planner);
VMO_API int32_t vmo_planner_is_resident(const vmo_planner* planner, int32_t layer,
                                        int32_t expert);

// out[e] = sum over rows of weight * (times the row chose e); weights NULL means 1 each.
// ids [num_rows, top_k]; out [num_experts] is overwritten. -1 on an id out of range.
VMO_API int32_t vmo_expert_histogram(const void* ids, int64_t num_rows, int32_t top_k,
                                     int32_t id_bytes, const float* weights,
                                     int32_t num_experts, float* out);

// ---- router lookahead ----------------------------------------------------------------
typedef struct vmo_lookahead vmo_lookahead;

// Types of floats: 0 float32, 1 bfloat16, 2 float16. The routers' weight
// [num_layers, num_experts, hidden_size] is float32 or bfloat16, their bias float32 or NULL;
// the evidence is float32 [depth, 2, 16] (lookahead.h). All of them stay the caller's.
VMO_API vmo_lookahead* vmo_lookahead_create(int32_t num_layers, int32_t num_experts,
                                            int32_t hidden_size, int32_t top_k, int32_t depth,
                                            int32_t max_rows, float memory, const void* weight,
                                            int32_t weight_type, const float* bias,
                                            float* tried, float* right, float* trust);
VMO_API void vmo_lookahead_destroy(vmo_lookahead* lookahead);
// The layer whose guesses vmo_lookahead_observe judges in this step; -1 on error.
VMO_API int32_t vmo_lookahead_begin_step(vmo_lookahead* lookahead, int64_t num_rows);
// ids int64 [num_rows, top_k]. 0, or -1 on an id out of range.
VMO_API int32_t vmo_lookahead_observe(vmo_lookahead* lookahead, int32_t layer,
                                      const int64_t* ids);
// reads [max_reads, 3] receives layer, expert and slot of each that is to be read ahead;
// returns how many there are, -1 on error. Rows of `hidden` lie `stride` elements apart.
VMO_API int32_t vmo_lookahead_foresee(vmo_lookahead* lookahead, vmo_planner* planner,
                                      int32_t layer, const void* hidden, int32_t hidden_type,
                                      int64_t stride, float threshold, float value,
                                      int32_t max_reads, int32_t* reads);

// ---- serving -------------------------------------------------------------------------
// Where a policy keeps what a step routed to, and what its scores gain by it; the memory is the
// caller's. With follows 0 and no ids there is nothing to do.
typedef struct vmo_observer {
  int32_t* ids;        // [num_layers, ids_per_layer] or NULL: need not be kept
  float* votes;        // [num_layers, num_experts]
  float* scores;       // the same
  const float* fade;   // the same or NULL: nothing, besides what `decay` takes
  const float* gains;  // [num_layers], for a whole vote
  float decay;
  int32_t ids_per_layer;
  int32_t follows;  // scores: 0 stay, 1 gain by votes, 2 by being used, however much
  int32_t layers_seen;
} vmo_observer;

// Fields as in LayerCall (serving.h).
typedef struct vmo_layer_call {
  const void* ids;
  const float* weights;
  void* rows;
  const void* hidden;
  int64_t num_rows;
  int64_t num_padded_rows;
  int64_t hidden_stride;
  int32_t layer;
  int32_t id_bytes;
  int32_t top_k;
  uint32_t flags;
  int32_t hidden_type;
  int32_t max_reads;
  float threshold;
  float value;
} vmo_layer_call;

// One layer call: observes (observer may be NULL), plans, writes rows and, if nothing is
// missing, looks ahead (lookahead may be NULL). `info` receives {distinct experts, hits,
// misses, reads, nanoseconds of observing and looking ahead}; `reads` [max_reads, 3]. 1:
// planned; 0: does not fit at once, only observed; -1: error.
VMO_API int32_t vmo_serve_layer(vmo_planner* planner, vmo_observer* observer,
                                vmo_lookahead* lookahead, const vmo_layer_call* call,
                                int64_t info[5], int32_t* reads);

// ---- scores -----------------------------------------------------------------------------
// scores[i] = scores[i] * decay + votes[i] * gain - fade[i], for i < count.
VMO_API void vmo_follow(float* scores, const float* votes, const float* fade, float gain,
                        float decay, int64_t count);

// Fields as in ValueStep (follow.h).
typedef struct vmo_value_step {
  float* values;
  const float* weights;
  const float* states;
  const int32_t* ids;
  const int32_t* owners;
  const int64_t* running;
  const float* kept;
  float* scores;
  const float* factors;
  int32_t num_layers;
  int32_t num_experts;
  int32_t first_layer;
  int32_t end_layer;
  int32_t num_rows;
  int32_t top_k;
  int32_t num_running;
  float use;
} vmo_value_step;

// Lets forecasts and scores follow the routing of consecutive layers. 0, or -1 on an id out of
// range.
VMO_API int32_t vmo_follow_values(const vmo_value_step* step);

// ---- file reader -------------------------------------------------------------------
typedef struct vmo_reader vmo_reader;

// One extent of a record: `length` bytes to `destination`. Extents of one request are
// consecutive in the file. For O_DIRECT both, and the request's offset, must be multiples
// of 4096.
typedef struct vmo_extent {
  void* destination;
  uint64_t length;
} vmo_extent;

// One record read: extents filled from `offset` on. `tag` is the caller's; it is in use
// until its completion was taken by vmo_reader_wait, or vmo_reader_cancel returned 1.
typedef struct vmo_read {
  uint64_t offset;
  const vmo_extent* extents;
  int32_t num_extents;
  int32_t priority;  // 0 demand, 1 prefetch: no prefetch begins while a demand waits
  int64_t tag;
} vmo_read;

typedef struct vmo_completion {
  int64_t tag;
  int32_t error;  // errno; 0 if all bytes arrived; -1 for a file that ends too early
  int32_t padding;
  uint64_t bytes;  // bytes that arrived
} vmo_completion;

// Opens `path` read-only. direct 1: O_DIRECT, error where the file system refuses;
// 0: page cache. `cpus` (num_cpus entries) is the affinity of the I/O threads; with none
// they inherit that of the calling thread.
VMO_API vmo_reader* vmo_reader_open(const char* path, int32_t direct, int32_t num_threads,
                                    const int32_t* cpus, int32_t num_cpus);
// Waits for chunks that are being read, drops the rest. No other call may be running.
VMO_API void vmo_reader_close(vmo_reader* reader);
// Size of the file when it was opened.
VMO_API int64_t vmo_reader_file_bytes(const vmo_reader* reader);

// Reads that ended and were not taken by vmo_reader_wait yet: a number in place, so that
// looking costs nothing.
VMO_API const int32_t* vmo_reader_num_ended(const vmo_reader* reader);

// Queues reads (the array and its extents are copied). 0; or -1 on an empty or unaligned
// extent or a tag in use, then none is queued.
VMO_API int32_t vmo_reader_submit(vmo_reader* reader, const vmo_read* reads, int32_t num_reads);
// Moves what is still queued of the prefetch with `tag` to demand priority; 1 if there was
// something to move.
VMO_API int32_t vmo_reader_promote(vmo_reader* reader, int64_t tag);
// Drops a queued read; 1 if dropped, 0 if it began or ended (it will be reported).
VMO_API int32_t vmo_reader_cancel(vmo_reader* reader, int64_t tag);
// Reads no more of a read that began; 1 if it will be reported with ECANCELED, 0 if all of it
// was handed to threads already.
VMO_API int32_t vmo_reader_abort(vmo_reader* reader, int64_t tag);
// Copies up to `capacity` (at most 64) completions, blocking (asleep, never spinning) until
// `min_count` are there, `timeout_ms` passed (0: do not wait, -1: for ever) or no more are
// in flight. Returns their number. A read is reported once, when nothing writes to it any
// more.
VMO_API int32_t vmo_reader_wait(vmo_reader* reader, vmo_completion* completions,
                                int32_t capacity, int32_t min_count, int32_t timeout_ms);

#ifdef __cplusplus
}
#endif

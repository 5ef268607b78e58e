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

// Number of this interface: raised by every change of a function or a struct below. Whoever
// loads the library compares it with the number that it was written for.
#define VMO_ABI_VERSION 4
VMO_API int32_t vmo_abi_version(void);

VMO_API const char* vmo_last_error(void);

// An id that stands for no expert, as of tokens that are padding: no vote, no need, no slot of
// its own. Any other id outside [0, num_experts) is an error.
#define VMO_NO_EXPERT (-1)

// ---- planner -----------------------------------------------------------------------
typedef struct vmo_planner vmo_planner;

// Totals since the planner was made.
typedef struct vmo_counters {
  int64_t hits;
  int64_t misses;
  int64_t bypasses;  // misses that were not kept
  int64_t evictions;
  int64_t prefetch_issued;
  int64_t prefetch_useful;  // resident before first use
  int64_t prefetch_late;    // needed while still in flight
  int64_t prefetch_wasted;  // evicted, or failed, before any use
  int64_t calls;            // layer calls that counted
} vmo_counters;

// Where a planner keeps what it shows; all of it is updated in place.
typedef struct vmo_planner_view {
  float* scores;              // [num_layers, num_experts], written by a policy
  const int32_t* page_table;  // the same: slot or -1
  const uint64_t* last_use;   // the same: clock of the last counted use, 0 if never used
  const vmo_counters* counters;
  const int32_t* num_resident;  // experts in slots whose bytes are there
  // Of the current plan, capacity num_experts each: the first num_experts (misses: num_misses)
  // of its outcome.
  const int32_t* experts;  // distinct, ascending
  const int32_t* slots;    // their slots
  const int32_t* miss_experts;
  const int32_t* miss_slots;
  const int32_t* miss_kinds;  // MissKind (planner.h)
} vmo_planner_view;

// Fields as in PlannerConfig (planner.h); order 0 score, 1 recency; scope 0 global,
// 1 per layer. `view` receives where things are.
VMO_API vmo_planner* vmo_planner_create(int32_t num_layers, int32_t num_experts,
                                        int32_t num_slots, int32_t num_staging_slots,
                                        int32_t order, int32_t scope, int32_t admission,
                                        vmo_planner_view* view);
VMO_API void vmo_planner_destroy(vmo_planner* planner);

VMO_API int32_t vmo_planner_finish(vmo_planner* planner);
VMO_API int32_t vmo_planner_complete(vmo_planner* planner, int32_t slot, int32_t ok);
// Slot reserved, -1 nothing to do, -2 error.
VMO_API int32_t vmo_planner_prefetch(vmo_planner* planner, int32_t layer, int32_t expert,
                                     float value);
VMO_API int32_t vmo_planner_cancel_prefetch(vmo_planner* planner, int32_t slot);

VMO_API int32_t vmo_planner_is_resident(const vmo_planner* planner, int32_t layer,
                                        int32_t expert);

// out[e] = sum over tokens of weight * (times the token chose e); weights NULL means 1 each.
// ids [num_tokens, top_k], VMO_NO_EXPERT counts nowhere; out [num_experts] is overwritten. -1
// on an id out of range.
VMO_API int32_t vmo_expert_histogram(const void* ids, int64_t num_tokens, int32_t top_k,
                                     int32_t id_bytes, const float* weights,
                                     int32_t num_experts, float* out);

// ---- serving -------------------------------------------------------------------------
typedef struct vmo_lookahead vmo_lookahead;

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

// An expert that is to be read ahead, and the slot reserved for it.
typedef struct vmo_reserved_slot {
  int32_t layer;
  int32_t expert;
  int32_t slot;
} vmo_reserved_slot;

// One layer call from the routing on. All memory is the caller's.
typedef struct vmo_layer_call {
  const void* ids;           // [num_padded_tokens, top_k], VMO_NO_EXPERT among them
  void* slots;               // like ids, receives every id's slot; VMO_NO_EXPERT and padding
                             // get one that is needed anyway, 0 if none is. Or NULL
  const float* weights;      // [num_tokens], the tokens' votes; NULL: 1 each
  vmo_observer* observer;    // or NULL: nobody observes
  vmo_lookahead* lookahead;  // or NULL: nobody looks ahead
  const void* hidden;        // what the router was given; NULL: do not look ahead
  vmo_reserved_slot* reads;  // [max_reads], receives what is to be read ahead
  int64_t num_tokens;        // the others are padding
  int64_t num_padded_tokens;
  int64_t hidden_stride;  // elements from one token of `hidden` to the next
  int32_t layer;
  int32_t id_bytes;  // 4 or 8, of ids and slots
  int32_t top_k;
  uint32_t flags;       // PlanFlags (planner.h)
  int32_t hidden_type;  // 0 float32, 1 bfloat16, 2 float16
  int32_t max_reads;
  float threshold;  // least probability that is worth a read
  float value;      // score of an expert that is used for certain
} vmo_layer_call;

// What one layer call came to.
typedef struct vmo_layer_outcome {
  int32_t num_experts;  // distinct experts needed
  int32_t num_hits;
  int32_t num_misses;
  int32_t num_reads;  // to be read ahead
  int64_t policy_ns;  // spent on observing and looking ahead
} vmo_layer_outcome;

// Observes, plans, writes slots and, if nothing is missing, looks ahead; each but planning only
// if the call asks for it. 1: planned; 0: does not fit at once, only observed; -1: error.
VMO_API int32_t vmo_serve_layer(vmo_planner* planner, const vmo_layer_call* call,
                                vmo_layer_outcome* outcome);

// ---- router lookahead ----------------------------------------------------------------
// Types of floats as in vmo_layer_call. The routers' weight
// [num_layers, num_experts, hidden_size] is float32 or bfloat16, their bias float32 or NULL;
// the planner's experts are the first num_own_experts of them, and what observe is told of the
// others is VMO_NO_EXPERT; the evidence is float32 [depth, 2, 16] (lookahead.h). All of them
// stay the caller's.
VMO_API vmo_lookahead* vmo_lookahead_create(int32_t num_layers, int32_t num_experts,
                                            int32_t num_own_experts, int32_t hidden_size,
                                            int32_t top_k, int32_t depth, int32_t max_tokens,
                                            float memory, const void* weight,
                                            int32_t weight_type, const float* bias,
                                            float* tried, float* right, float* trust);
VMO_API void vmo_lookahead_destroy(vmo_lookahead* lookahead);
// The layer whose guesses vmo_lookahead_observe judges in this step; -1 on error.
VMO_API int32_t vmo_lookahead_begin_step(vmo_lookahead* lookahead, int64_t num_tokens);
// ids int64 [num_tokens, top_k]. 0, or -1 on an id out of range.
VMO_API int32_t vmo_lookahead_observe(vmo_lookahead* lookahead, int32_t layer,
                                      const int64_t* ids);
// What a layer call would look ahead for, and nothing else of it. Returns how many of the
// call's `reads` there are, -1 on error.
VMO_API int32_t vmo_lookahead_foresee(vmo_lookahead* lookahead, vmo_planner* planner,
                                      const vmo_layer_call* call);

// ---- scores -----------------------------------------------------------------------------
// scores[i] = scores[i] * decay + votes[i] * gain - fade[i], for i < count.
VMO_API void vmo_follow(float* scores, const float* votes, const float* fade, float gain,
                        float decay, int64_t count);

// Routing of consecutive layers, and the successor model (forecast/successor.py) that it
// changes; size = num_layers * num_experts.
typedef struct vmo_value_step {
  float* values;           // [requests, size], the model's forecasts, brought up to date
  const float* weights;    // [size, size]
  const float* states;     // [requests, size], before the step
  const int32_t* ids;      // [end_layer - first_layer, num_tokens, top_k]
  const int32_t* owners;   // [num_tokens], index into running
  const int64_t* running;  // [num_running], the requests of the step
  const float* kept;       // [num_running], what the step leaves of a state
  float* scores;           // [num_layers, num_experts]
  const float* factors;    // [num_layers], of a forecast's change in the score
  int32_t num_layers;
  int32_t num_experts;
  int32_t first_layer;
  int32_t end_layer;
  int32_t num_tokens;
  int32_t top_k;
  int32_t num_running;
  float use;  // what a use adds to a state
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

// One record read: extents filled from `offset` on in the reader's files, one behind the other;
// of one file only. `tag` is the caller's; it is in use until its completion was taken by
// vmo_reader_wait, or vmo_reader_drop returned 1.
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

// Opens `paths` (num_paths entries) read-only. direct 1: O_DIRECT, error where the file system
// refuses; 0: page cache. `cpus` (num_cpus entries) is the affinity of the I/O threads; with
// none they inherit that of the calling thread.
VMO_API vmo_reader* vmo_reader_open(const char* const* paths, int32_t num_paths, int32_t direct,
                                    int32_t num_threads, const int32_t* cpus, int32_t num_cpus);
// Waits for chunks that are being read, drops the rest. No other call may be running. In a
// process that was forked from the reader's, where the functions below fail: closes the files.
VMO_API void vmo_reader_close(vmo_reader* reader);
// Size of the files together when they were opened.
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
// Drops a read that has not begun: 1, it will not be reported. 0: it will be; with ECANCELED,
// and no more of it read, unless all of it was handed to threads or it ended.
VMO_API int32_t vmo_reader_drop(vmo_reader* reader, int64_t tag);
// Copies up to `capacity` (at most 64) completions, blocking (asleep, never spinning) until
// `min_count` are there, `timeout_ms` passed (0: do not wait, -1: for ever) or no more are
// in flight. Returns their number. A read is reported once, when nothing writes to it any
// more.
VMO_API int32_t vmo_reader_wait(vmo_reader* reader, vmo_completion* completions,
                                int32_t capacity, int32_t min_count, int32_t timeout_ms);

#ifdef __cplusplus
}
#endif

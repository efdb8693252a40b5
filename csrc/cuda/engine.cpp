// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/engine.h"

#include <algorithm>

#include "csrc/arena.h"

namespace visionpulse::cuda {

namespace {

constexpr int64_t kScratchAlign = 256;

int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat8 ? 1 : dtype == DType::kFloat32 ? 4 : 2;
}

const char* select_name(bool cluster) { return cluster ? "vp_select_cluster" : "vp_select_global"; }

Shape shape_of(const Call& call) {
  return {kind_of(call.dtype, call.cache.dtype),
          call.B,
          call.H,
          call.G,
          call.D,
          call.cache.capacity,
          call.queries.count};
}

// Loads all that steps of this shape may launch: what runs first may be a dense layer, and the
// first anchor lies in the capture of a graph.
void load_kernels(const Call& call, const Chip& chip) {
  for (const Stage stage : {Stage::kAttend, Stage::kScore}) {
    const StreamKernel& kernel = kernel_of(stage, shape_of(call));
    load(kernel.name, kernel.function, call.device);
  }
  load("vp_score_finish", score_finish_kernel(), call.device);
  load(select_name(chip.clusters()), select_kernel(chip.clusters()), call.device);
}

// The largest power of two, up to 16, that all keys and values start at a multiple of.
int32_t alignment(const Call& call) {
  const int64_t size = bytes_of(call.cache.dtype);
  uint64_t all =
      reinterpret_cast<uintptr_t>(call.cache.k) | reinterpret_cast<uintptr_t>(call.cache.v);
  for (const Strides& s : {call.cache.k_stride, call.cache.v_stride}) {
    all |= static_cast<uint64_t>(s.outer * size) | static_cast<uint64_t>(s.head * size) |
           static_cast<uint64_t>(s.token * size);
  }
  all |= static_cast<uint64_t>(call.D * size) | 16;
  return static_cast<int32_t>(all & (~all + 1));
}

// Whether consecutive keys lie in memory as they do in a tile.
bool lies_in_place(const Call& call, const StreamKernel& kernel) {
  return kernel.in_place && call.D == kernel.padded_dim && alignment(call) == 16 &&
         call.cache.k_stride.token == call.D && call.cache.v_stride.token == call.D;
}

StreamArgs stream_args(const Call& call, const StreamPlan& plan, Arena& arena,
                       const Scratch& scratch) {
  StreamArgs args = {};
  args.kv = call.cache;
  args.visual = call.visual;
  args.q = call.q;
  args.q_stride = call.q_stride;
  args.out = call.out;
  args.out_stride = call.out_stride;
  args.dtype = call.dtype;
  args.scale = call.score.scale;
  args.softcap = call.score.softcap;
  args.inverse_tau = call.score.tau > 0.0f ? 1.0f / call.score.tau : 1.0f;
  args.window = call.score.window;
  args.heads = call.H;
  args.kv_heads = call.G * plan.head_blocks;
  args.group = call.H / call.G;
  args.queries = call.queries;
  args.head_blocks = plan.head_blocks;
  args.group_reciprocal = (65535 + args.group) / args.group;
  args.head_dim = call.D;
  args.team = plan.team;
  args.team_log2 = plan.team / 2;  // of 1, 2 or 4
  args.stages = plan.stages;
  args.align = alignment(call);
  args.bulk = bulk_copies(chip_of(call.device), call.copies) && lies_in_place(call, *plan.kernel);
  args.k_bytes = plan.k_bytes;
  args.v_bytes = plan.v_bytes;
  args.rule = plan.rule;
  while (1 << args.tile_log2 < plan.rule.tile) ++args.tile_log2;
  args.parts_reciprocal = reciprocal_of(plan.rule.target_parts);
  args.merge = plan.merge;
  args.max_splits = plan.max_splits;
  args.part_stats = arena.take<float>(plan.part_stats);
  args.part_out = arena.take<float>(plan.part_out);
  args.counters = scratch.counters;
  return args;
}

void launch_stream(const char* range, const Call& call, const StreamPlan& plan,
                   const StreamArgs& args) {
  const dim3 grid(plan.max_splits, call.G * plan.head_blocks, call.B);
  const Launch what = {range,
                       plan.kernel->name,
                       plan.kernel->function,
                       grid,
                       plan.warps * kThreadsPerWarp,
                       plan.shared_bytes,
                       1};
  launch(what, &args, call.device, call.stream);
}

constexpr const char* kScoreRange = "visionpulse::score";
constexpr const char* kAttendRange = "visionpulse::attend";

// What the pass over K stores for the launches behind it.
struct ScoreOutputs {
  float* logits;  // [B, H, stride]
  float* sums;    // [B, parts, stride]; of several queries the logits themselves
  float* stats;   // [B, H, kHeadStats]
  int64_t stride;
  int32_t parts;     // G * team, or H
  bool by_position;  // an entry for each key of the row; else for its visual ones alone
};

int64_t rounded(int64_t count) { return (count + 7) / 8 * 8; }

StreamArgs score_args(const Call& call, const StreamPlan& plan, bool all_logits, Arena& arena,
                      const Scratch& scratch, ScoreOutputs& outputs) {
  StreamArgs args = stream_args(call, plan, arena, scratch);
  // The heads of several queries lie across the warps that would sum them.
  const bool several = call.queries.count > 1;
  const bool sums = call.score.kind == ScoreKind::kLogit && !several;
  outputs.by_position = all_logits;
  outputs.stride = rounded(all_logits ? call.cache.capacity : call.candidates);
  outputs.parts = several ? call.H : call.G * plan.team;
  args.store = all_logits ? StoredLogits::kAll : sums ? StoredLogits::kNone : StoredLogits::kVisual;
  const int64_t rows = int64_t{call.B} * call.queries.count;
  outputs.stats = arena.take<float>(rows * call.H * kHeadStats);
  outputs.logits = args.store == StoredLogits::kNone
                       ? nullptr
                       : arena.take<float>(rows * call.H * outputs.stride);
  args.sums = sums ? arena.take<float>(rows * outputs.parts * outputs.stride) : nullptr;
  outputs.sums = several ? outputs.logits : args.sums;
  args.logits = outputs.logits;
  args.logits_stride = outputs.stride;
  args.stats = outputs.stats;
  return args;
}

// What select reads: scores, or the sums of logits as the pass over K stores them.
struct ScoreSource {
  const float* scores;  // [B, parts, stride]
  int64_t stride;
  int32_t parts;
  float weight;
  bool by_position;
};

// `scores` [B, N] are the caller's; nullptr: scratch memory for those of the candidates alone.
ScoreFinishArgs score_finish_args(const Call& call, const ScoreOutputs& outputs, float* scores,
                                  bool masses, Arena& arena) {
  ScoreFinishArgs args = {};
  args.kv = call.cache;
  args.visual = call.visual;
  args.window = call.score.window;
  args.heads = call.H;
  args.sum_parts = outputs.parts;
  args.kind = call.score.kind;
  args.inverse_tau = 1.0f / call.score.tau;
  args.logits = outputs.logits;
  args.sums = outputs.sums;
  args.logits_stride = outputs.stride;
  args.logits_by_position = outputs.by_position;
  args.scores_by_position = scores != nullptr;
  args.stats = outputs.stats;
  args.scores_stride = scores ? call.cache.capacity : rounded(call.candidates);
  args.scores = scores ? scores : arena.take<float>(call.B * args.scores_stride);
  args.mass = masses ? call.mass : nullptr;
  args.mass_mean = call.mass_mean;
  return args;
}

void launch_score_finish(const Call& call, const ScoreFinishArgs& args) {
  const int64_t blocks = (args.scores_stride + kScoreFinishThreads - 1) / kScoreFinishThreads;
  const dim3 grid(std::max<int64_t>(blocks, 1), call.B);
  launch({kScoreRange, "vp_score_finish", score_finish_kernel(), grid, kScoreFinishThreads,
          call.H * 4, 1},
         &args, call.device, call.stream);
}

// `stats` nullptr: the masses are the caller's.
SelectArgs select_args(const Call& call, const SelectPlan& plan, const ScoreSource& source,
                       const float* stats, Arena& arena, const Scratch& scratch) {
  SelectArgs args = {};
  args.kv = call.cache;
  args.visual = call.visual;
  args.window = call.score.window;
  args.scores = source.scores;
  args.scores_stride = source.parts * source.stride;
  args.part_stride = source.stride;
  args.parts = source.parts;
  args.weight = source.weight;
  args.by_position = source.by_position;
  args.stats = stats;
  args.heads = call.H;
  args.mass = call.mass;
  args.mass_mean = call.mass_mean;
  args.ratio = call.score.ratio;
  args.wanted = call.score.wanted;
  args.r_min = call.score.r_min;
  args.r_max = call.score.r_max;
  args.mean_mass = call.score.mass_of == MassOf::kMean;
  args.k_max = call.score.k_max;
  args.blocks = plan.blocks;
  args.cached = plan.cached;
  args.indices = call.indices;
  args.counts = call.counts;
  args.sort_codes = arena.take<uint32_t>(call.B * plan.codes_stride);
  args.positions = arena.take<uint32_t>(call.B * plan.codes_stride);
  args.codes_stride = plan.codes_stride;
  args.histograms = arena.take<uint32_t>(call.B * plan.histograms);
  args.counters = scratch.counters;
  return args;
}

void launch_select(const Call& call, const SelectPlan& plan, const SelectArgs& args) {
  launch({"visionpulse::select", select_name(plan.cluster), select_kernel(plan.cluster),
          dim3(call.B * plan.blocks), kSelectThreads, plan.shared_bytes,
          plan.cluster ? plan.blocks : 1},
         &args, call.device, call.stream);
}

}  // namespace

int64_t attend(const Call& call, const Scratch& scratch) {
  const OnDevice current(call.device);
  const StreamPlan plan = plan_stream(Stage::kAttend, chip_of(call.device), shape_of(call),
                                      {true, true, call.selection.indices != nullptr});
  Arena arena(scratch.bytes, scratch.size, kScratchAlign);
  StreamArgs args = stream_args(call, plan, arena, scratch);
  args.selection = call.selection;
  args.check_list = call.check_list;
  if (arena.lacking()) return arena.lacking();
  load_kernels(call, chip_of(call.device));
  launch_stream(kAttendRange, call, plan, args);
  return 0;
}

int64_t score(const Call& call, const Call& rows, float* scores, const Scratch& scratch) {
  const OnDevice current(call.device);
  const StreamPlan plan = plan_stream(Stage::kScore, chip_of(call.device), shape_of(call),
                                      {true, call.out != nullptr, false});
  Arena arena(scratch.bytes, scratch.size, kScratchAlign);
  ScoreOutputs outputs = {};
  const StreamArgs args = score_args(call, plan, false, arena, scratch, outputs);
  const ScoreFinishArgs finish = score_finish_args(rows, outputs, scores, true, arena);
  if (arena.lacking()) return arena.lacking();
  load_kernels(call, chip_of(call.device));
  launch_stream(kScoreRange, call, plan, args);
  launch_score_finish(rows, finish);
  return 0;
}

int64_t select(const Call& call, const float* scores, const Scratch& scratch) {
  const OnDevice current(call.device);
  const SelectPlan plan = plan_select(chip_of(call.device), call.candidates);
  Arena arena(scratch.bytes, scratch.size, kScratchAlign);
  const ScoreSource source = {scores, call.cache.capacity, 1, 1.0f, true};
  const SelectArgs args = select_args(call, plan, source, nullptr, arena, scratch);
  if (arena.lacking()) return arena.lacking();
  launch_select(call, plan, args);
  return 0;
}

int64_t decode(const Call& call, bool dense, float* scores, const Scratch& scratch) {
  const OnDevice current(call.device);
  const Chip& chip = chip_of(call.device);
  const StreamPlan score_plan =
      plan_stream(Stage::kScore, chip, shape_of(call), {true, dense, false});
  const StreamPlan attend_plan =
      plan_stream(Stage::kAttend, chip, shape_of(call), {false, true, true});
  const SelectPlan select_plan = plan_select(chip, call.candidates);
  Arena arena(scratch.bytes, scratch.size, kScratchAlign);
  ScoreOutputs outputs = {};
  const StreamArgs score = score_args(call, score_plan, !dense, arena, scratch, outputs);
  StreamArgs attend = {};
  if (!dense) {
    attend = stream_args(call, attend_plan, arena, scratch);
    attend.selection = {call.indices, call.counts, call.score.k_max};
    attend.stored_logits = outputs.logits;
    attend.logits_stride = outputs.stride;
  }
  // Select reads the sums of logits as they lie. Probabilities become scores in a launch of their
  // own.
  const float weight = 1.0f / static_cast<float>(call.H);
  ScoreSource source = {outputs.sums, outputs.stride, outputs.parts, weight, outputs.by_position};
  const bool finishes = scores != nullptr || call.score.kind != ScoreKind::kLogit;
  ScoreFinishArgs finish = {};
  if (finishes) {
    finish = score_finish_args(call, outputs, scores, false, arena);
    source = {finish.scores, finish.scores_stride, 1, 1.0f, finish.scores_by_position};
  }
  const SelectArgs select = select_args(call, select_plan, source, outputs.stats, arena, scratch);
  if (arena.lacking()) return arena.lacking();
  load_kernels(call, chip);

  launch_stream(kScoreRange, call, score_plan, score);
  if (finishes) launch_score_finish(call, finish);
  launch_select(call, select_plan, select);
  if (!dense) launch_stream(kAttendRange, call, attend_plan, attend);
  return 0;
}

}  // namespace visionpulse::cuda

// Accepted tokens of a verify that kept (u, k, decay) and no state: S <- diag(decay) S + k u^T for each of
// them, with the bits that the recurrence would have left.
#include "recurrent/places.cuh"
#include "recurrent/state.cuh"

KDA_KERNEL(kda::Config::scan_warps * 32, 1) kda_replay(KDA_GRID_CONSTANT kda::KernelArgs args) {
  using namespace kda;
  begin_kernel();
  const Work w = find_work(args);
  if (w.idle) return;
  const Numbers numbers = load_numbers(args, w);
  const i64 read = numbers.read(args, w);
  const LoadedState loaded = load_state(args, read, w, is_readable(args, w, numbers, read));
  sync_warp(); // or ptxas moves half of the state's loads behind the arithmetic
  const Places places = find_places(args, w, numbers);
  if (!places.runs) return;
  u64 path = 0;
  if constexpr (Config::tree) path = path_to(args, w, places.steps - 1);
  float state[kRows][kChannels];
  widen_state(loaded, state);
  for (i64 i = 0; i < places.steps; ++i) {
    if (Config::tree && (path >> i & 1) == 0) continue;
    const i64 t = w.begin + i;
    float k[kChannels], decay[kChannels];
    load_row<Config::K, kLanes>(row_of<const float>(args.update_k, w.batch, t, w.value_head / Config::group),
                                w.lane, k);
    load_row<Config::K, kLanes>(row_of<const float>(args.update_decay, w.batch, t, w.value_head), w.lane,
                                decay);
    apply_update(w, k, decay, row_of<const float>(args.update_u, w.batch, t, w.value_head), state);
  }
  if (places.write != kNowhere) store_state(args.final_state, places.write, w, state);
}

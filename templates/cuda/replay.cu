// Accepted tokens of a verify that kept (u, k, decay) and no state: S <- diag(decay) S + k u^T for each of
// them, with the bits that the recurrence would have left.
#include "recurrent/places.cuh"
#include "recurrent/state.cuh"

KDA_KERNEL(kda::Config::scan_warps * 32, 1) kda_replay(KDA_GRID_CONSTANT kda::KernelArgs args) {
  using namespace kda;
  const i64 unit = static_cast<i64>(block_index_x()) * Config::scan_warps + warp_index();
  if (unit >= work_units(args, false)) return;
  const Work w = find_work(args, unit);
  const Places places = find_places(args, w);
  if (!places.runs) return;
  float state[kRows][kChannels];
  load_state(args.initial_state, places.read, w, state);
  sync_warp();
  u64 path = 0;
  if constexpr (Config::tree) path = path_to(args, w, places.steps - 1);
  for (i64 i = 0; i < places.steps; ++i) {
    if (Config::tree && (path >> i & 1) == 0) continue;
    const i64 t = w.begin + i;
    float k[kChannels], decay[kChannels];
    load_row<Config::K>(row_of<const float>(args.update_k, w.batch, t, w.value_head / Config::group), w.lane,
                        k);
    load_row<Config::K>(row_of<const float>(args.update_decay, w.batch, t, w.value_head), w.lane, decay);
    apply_update(w, k, decay, row_of<const float>(args.update_u, w.batch, t, w.value_head), state);
  }
  store_state(args.final_state, places.write, w, state);
}

#pragma once
// Calls of the recurrence whose states lie in a pool of slots, on any backend, against the float64 recurrence
// of each sequence. Whatever no slot number names must keep its bits: other slots, gaps between slots.
#include "kda/case_io.h"
#include "marshal.h"
#include "random_case.h"
#include "run_case.h"
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <sys/mman.h>

namespace kda::test {

struct PoolCall {
  CaseOptions options;               ///< with a pool in its problem
  IndexType type = IndexType::int32; ///< of the slot numbers
  PaddingPolicy padding = PaddingPolicy::none;
  std::int64_t slots = 6; ///< of each pool
  bool in_place = true;   ///< one pool, else two
  /// By sequence, with columns row after row; empty: no initial_state, no final_state.
  std::vector<std::int64_t> read, write;
  std::vector<std::int64_t> accepted;         ///< by sequence; empty: not given
  std::vector<std::int64_t> parents;          ///< tree: by sequence and token, `columns` wide
  std::int64_t read_columns = 1, columns = 1; ///< of read; of write (every_state) and parents
  std::int64_t table_stride = 1;              ///< elements from one number of a row to the next
  bool column_major = false;                  ///< tables with columns: sequences are neighbours
  std::int64_t gap = 0;                       ///< bytes behind each slot, a multiple of 16
  /// fp32, in place: the pool begins `far_slot` slots of `far_stride` elements behind this, and
  /// so do its numbers.
  float* far_base = nullptr;
  std::int64_t far_slot = 0, far_stride = 0;
};

/// What the contract in kda/engine.h says becomes of a sequence.
enum class Fate : std::uint8_t { runs, padding, refused };
struct Sequence {
  Fate fate = Fate::runs;
  std::int64_t read = -1;            ///< -1: none
  std::vector<std::int64_t> write{}; ///< the slot of the last state, or one a token; -1: none
};

class PoolRun {
public:
  PoolRun(const Backend& backend, const PoolCall& call)
      : backend_(backend), call_(call), case_(random_case(recurrent(call.options))),
        p_(call.options.problem) {
    case_.inputs.problem = p_;
    const auto n = static_cast<std::size_t>(case_.inputs.sizes.sequences);
    for (std::size_t i = 0; i < n; ++i)
      sequences_.push_back(sequence(i));
  }
  PoolRun(const PoolRun&) = delete;
  PoolRun& operator=(const PoolRun&) = delete;
  ~PoolRun() {
    for (void* data : all_)
      backend_.release(data);
  }

  /// Empty, or what is wrong.
  std::string run(const Variant& variant) {
    fill_pools();
    for (std::size_t i = 0; i < sequences_.size() && p_.tree; ++i) {
      parents_.resize(static_cast<std::size_t>(case_.inputs.sizes.batch * case_.inputs.sizes.tokens), -1);
      for (std::int64_t t = span(i).first; t < span(i).second && sequences_[i].fate != Fate::refused; ++t)
        parents_[static_cast<std::size_t>(t)] = call_.parents[i * static_cast<std::size_t>(call_.columns) +
                                                              static_cast<std::size_t>(t - span(i).first)];
    }
    expected_ = reference::verify(case_.inputs, parents_);
    upload_all();
    const SourceUnit unit = emit(p_, variant, backend_.target()).value();
    const auto image = backend_.compile(unit);
    if (!image) return image.error().message + "\n" + image.error().context;
    const auto module = backend_.load(unit, *image);
    if (!module) return module.error().message;
    const LaunchList list = launches(p_, variant, backend_.target(), case_.inputs.sizes);
    for (int i = 0; i < list.count; ++i)
      if (const Status ok = (*module)->launch(list.items[i], args_, nullptr); !ok) return ok.error().message;
    if (const Status ok = backend_.synchronize(); !ok) return ok.error().message;
    std::string wrong = compare_word();
    if (wrong.empty() && p_.operation != Operation::replay) wrong = compare_output(expected_.o);
    if (wrong.empty() && p_.updates)
      for (const auto& [name, tensor, values, heads, dim] : updates())
        if (wrong.empty()) wrong = compare_update(name, tensor->data, *values, heads, dim);
    if (wrong.empty()) wrong = compare_pools();
    return wrong;
  }

private:
  using Bytes = std::vector<std::byte>;

  static CaseOptions recurrent(CaseOptions o) {
    o.problem.operation = Operation::recurrent; // replay: the tokens that the updates are made of
    return o;
  }

  /// Tokens [begin, end) of sequence i on the flattened token axis.
  std::pair<std::int64_t, std::int64_t> span(std::size_t i) const {
    const std::int64_t t = case_.inputs.sizes.tokens, n = static_cast<std::int64_t>(i);
    if (p_.varlen) return {case_.inputs.cu_seqlens[i], case_.inputs.cu_seqlens[i + 1]};
    return {n * t, n * t + t};
  }
  Sequence sequence(std::size_t i) const {
    const auto padding = [&](std::int64_t slot) {
      const PaddingPolicy x = call_.padding;
      return (slot < 0 && (x == PaddingPolicy::negative || x == PaddingPolicy::both)) ||
             (slot == 0 && (x == PaddingPolicy::zero || x == PaddingPolicy::both));
    };
    const auto outside = [&](std::int64_t slot) { return slot < 0 || slot >= call_.slots; };
    const bool reads = !call_.read.empty(), writes = !call_.write.empty();
    const std::int64_t tokens = span(i).second - span(i).first, row = static_cast<std::int64_t>(i);
    const bool replay = p_.operation == Operation::replay;
    const std::int64_t accepted = call_.accepted.empty() ? 1 : call_.accepted[i];
    if (accepted == 0) return {Fate::padding};
    if (accepted < 0 || accepted > (replay ? tokens : call_.read_columns)) return {Fate::refused};
    if (p_.tree)
      for (std::int64_t t = 0; t < tokens; ++t) {
        if (t >= call_.columns) return {Fate::refused};
        const std::int64_t parent = call_.parents[static_cast<std::size_t>(row * call_.columns + t)];
        if (parent >= t) return {Fate::refused};
      }
    const auto read = [&] {
      return call_.read[static_cast<std::size_t>(row * call_.read_columns + (replay ? 0 : accepted - 1))];
    };
    const std::int64_t columns = p_.every_state ? call_.columns : 1;
    const auto write = [&](std::int64_t t) {
      return call_.write[static_cast<std::size_t>(row * columns + t)];
    };
    if (reads ? padding(read()) : writes && padding(write(0))) return {Fate::padding};
    if (reads && outside(read())) return {Fate::refused};
    Sequence x{Fate::runs, reads ? read() : -1, {}};
    if (writes && p_.every_state && tokens > columns) return {Fate::refused};
    for (std::int64_t t = 0; writes && t < (p_.every_state ? tokens : 1); ++t) {
      if (!padding(write(t)) &&
          (outside(write(t)) || (p_.tree && p_.every_state && call_.in_place && write(t) == x.read)))
        return {Fate::refused};
      x.write.push_back(padding(write(t)) ? -1 : write(t));
    }
    return x;
  }

  // --- the pools, as bytes ---------------------------------------------------------------------------------
  std::size_t matrix() const { return static_cast<std::size_t>(p_.key_dim * p_.value_dim); }
  std::size_t slot_bytes() const {
    return static_cast<std::size_t>(p_.value_heads) * matrix() *
               static_cast<std::size_t>(size_of(p_.state_dtype)) +
           static_cast<std::size_t>(call_.gap);
  }
  /// A slot's state in the device's layout.
  reference::Array turned(const reference::Array& x) const {
    return p_.state_layout == StateLayout::v_k ? transposed(x, p_.key_dim, p_.value_dim) : x;
  }
  void put(Bytes& pool, std::int64_t slot, const reference::Array& state) const {
    const Bytes dense = pack(turned(state), p_.state_dtype);
    std::copy(dense.begin(), dense.end(),
              pool.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(slot) * slot_bytes()));
  }
  reference::Array get(const Bytes& pool, std::int64_t slot) const {
    const auto begin =
        pool.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(slot) * slot_bytes());
    const Bytes dense(
        begin, begin + static_cast<std::ptrdiff_t>(slot_bytes() - static_cast<std::size_t>(call_.gap)));
    const reference::Array x = unpack(dense, file_dtype(p_.state_dtype));
    return p_.state_layout == StateLayout::v_k ? transposed(x, p_.value_dim, p_.key_dim) : x;
  }

  /// Slots that a sequence reads get random states; everything else is NaN, which must not leak.
  void fill_pools() {
    const auto per_slot = static_cast<std::size_t>(p_.value_heads) * matrix();
    initial_.assign(static_cast<std::size_t>(call_.slots) * slot_bytes(), std::byte{0xFF});
    final_.assign(initial_.size(), std::byte{0xFE});
    // A kernel may read the slot of a row that it will refuse, as long as nothing comes of it.
    for (std::size_t i = 0; i < call_.read.size(); ++i) {
      const std::int64_t slot = call_.read[i];
      if (sequences_[i / static_cast<std::size_t>(call_.read_columns)].fate == Fate::refused && slot >= 0 &&
          slot < call_.slots)
        std::fill_n(initial_.begin() +
                        static_cast<std::ptrdiff_t>(slot) * static_cast<std::ptrdiff_t>(slot_bytes()),
                    slot_bytes(), std::byte{0xFE});
    }
    std::mt19937_64 engine(11);
    std::normal_distribution<double> normal(0, 0.5);
    case_.inputs.initial_state.assign(sequences_.size() * per_slot, 0);
    for (std::size_t n = 0; n < sequences_.size(); ++n) {
      const std::int64_t slot = sequences_[n].read;
      if (slot < 0) continue;
      const bool fresh = std::none_of(sequences_.begin(), sequences_.begin() + static_cast<std::ptrdiff_t>(n),
                                      [&](const Sequence& s) { return s.read == slot; });
      if (fresh) {
        reference::Array state(per_slot);
        for (double& x : state)
          x = normal(engine);
        put(initial_, slot, state);
      }
      const reference::Array rounded = get(initial_, slot);
      std::copy(rounded.begin(), rounded.end(),
                case_.inputs.initial_state.begin() + static_cast<std::ptrdiff_t>(n * per_slot));
    }
  }

  // --- arguments -------------------------------------------------------------------------------------------
  void* upload(const void* data, std::size_t bytes) {
    void* const to = backend_.allocate(bytes).value();
    all_.push_back(to);
    if (!backend_.copy_to_device(to, data, bytes)) std::abort();
    return to;
  }
  TokenTensor token(const reference::Array& x, DType dtype, int heads, int dim) {
    const Bytes bytes = pack(x, dtype);
    const long long row = static_cast<long long>(heads) * dim;
    return {upload(bytes.data(), bytes.size()), case_.inputs.sizes.tokens * row, row, dim};
  }
  NumberTable table(const std::vector<std::int64_t>& numbers, std::int64_t columns, std::int64_t add) {
    const auto rows = static_cast<std::int64_t>(sequences_.size());
    const std::int64_t row = call_.column_major ? call_.table_stride : columns * call_.table_stride,
                       column = call_.column_major ? rows * call_.table_stride : call_.table_stride;
    // What lies between is no number that belongs there.
    std::vector<std::int64_t> wide(static_cast<std::size_t>(rows * columns * call_.table_stride), 1'000'000);
    for (std::int64_t n = 0; n < rows; ++n)
      for (std::int64_t c = 0; c < columns; ++c)
        wide[static_cast<std::size_t>(n * row + c * column)] =
            numbers[static_cast<std::size_t>(n * columns + c)] + add;
    const std::vector<std::int32_t> narrow(wide.begin(), wide.end());
    const bool is_wide = call_.type == IndexType::int64;
    const void* const data =
        is_wide ? upload(wide.data(), wide.size() * 8) : upload(narrow.data(), narrow.size() * 4);
    return {data, row, column, static_cast<int>(columns), is_wide ? 1 : 0};
  }
  struct UpdateRows {
    const char* name;
    TokenTensor* tensor;
    reference::Array* values;
    int heads, dim;
  };
  std::array<UpdateRows, 3> updates() {
    return {{{"update_u", &args_.update_u, &expected_.u, p_.value_heads, p_.value_dim},
             {"update_k", &args_.update_k, &expected_.k, p_.heads, p_.key_dim},
             {"update_decay", &args_.update_decay, &expected_.decay, p_.value_heads, p_.key_dim}}};
  }
  void upload_all() {
    const reference::Inputs& in = case_.inputs;
    args_.q = token(in.q, p_.dtype, p_.heads, p_.key_dim);
    args_.k = token(in.k, p_.dtype, p_.heads, p_.key_dim);
    args_.v = token(in.v, p_.dtype, p_.value_heads, p_.value_dim);
    args_.g = token(in.g, p_.gate_dtype, p_.value_heads, p_.key_dim);
    args_.beta = token(in.beta, p_.beta_dtype, p_.value_heads, 1);
    args_.o = token(reference::Array(in.v.size(), std::nan("")), p_.dtype, p_.value_heads, p_.value_dim);
    const auto fp32 = [&](const reference::Array& x) -> const float* {
      if (x.empty()) return nullptr;
      const std::vector<float> narrow(x.begin(), x.end());
      return static_cast<const float*>(upload(narrow.data(), narrow.size() * sizeof(float)));
    };
    if (p_.updates || p_.operation == Operation::replay)
      for (const auto& [name, tensor, values, heads, dim] : updates())
        *tensor = token(p_.updates ? reference::Array(values->size(), std::nan("")) : *values, DType::fp32,
                        heads, dim);
    if (!call_.accepted.empty()) args_.accepted = table(call_.accepted, 1, 0);
    if (p_.tree) args_.parents = table(call_.parents, call_.columns, 0);
    args_.A_log = fp32(in.A_log);
    args_.dt_bias = fp32(in.dt_bias);
    if (p_.varlen) {
      const std::vector<std::int32_t> narrow(in.cu_seqlens.begin(), in.cu_seqlens.end());
      args_.cu_seqlens = p_.cu_seqlens_type == IndexType::int64
                             ? upload(in.cu_seqlens.data(), in.cu_seqlens.size() * 8)
                             : upload(narrow.data(), narrow.size() * 4);
    }
    args_.tokens = in.sizes.tokens;
    args_.batch = static_cast<int>(in.sizes.batch);
    args_.sequences = static_cast<int>(in.sizes.sequences);
    args_.heads = p_.heads;
    args_.value_heads = p_.value_heads;
    args_.head_reciprocal = head_reciprocal(p_.value_heads);
    args_.scale = static_cast<float>(in.scale == 0 ? 1 / std::sqrt(p_.key_dim) : in.scale);
    args_.lower_bound = static_cast<float>(in.lower_bound);
    const auto stride = static_cast<long long>(slot_bytes()) / size_of(p_.state_dtype);
    const auto head = static_cast<long long>(matrix());
    if (!call_.read.empty()) {
      args_.initial_state = {upload(initial_.data(), initial_.size()), stride, head};
      args_.read_slots = table(call_.read, call_.read_columns, call_.far_slot);
      args_.read_pool = call_.slots + call_.far_slot;
    }
    if (!call_.write.empty()) {
      void* const data = call_.in_place ? args_.initial_state.data : upload(final_.data(), final_.size());
      args_.final_state = {data, stride, head};
      args_.write_slots = table(call_.write, p_.every_state ? call_.columns : 1, call_.far_slot);
      args_.write_pool = call_.slots + call_.far_slot;
    }
    if (call_.far_base != nullptr) {
      if (!backend_.copy_to_device(far_data(), initial_.data(), initial_.size())) std::abort();
      args_.initial_state = args_.final_state = {call_.far_base, call_.far_stride, head};
    }
    constexpr int kBits[] = {0, kSkipNegative, kSkipZero, kSkipNegative | kSkipZero};
    args_.padding = kBits[static_cast<int>(call_.padding)];
    const int none = 0;
    args_.slot_error = static_cast<int*>(upload(&none, sizeof none));
  }

  [[nodiscard]] float* far_data() const { return call_.far_base + call_.far_slot * call_.far_stride; }

  // --- results ---------------------------------------------------------------------------------------------
  Bytes download(const void* data, std::size_t bytes) const {
    Bytes x(bytes);
    if (!backend_.copy_from_device(x.data(), data, bytes)) std::abort();
    return x;
  }
  double error_bound(DType type) const {
    return type == DType::fp32 ? 2e-5 : type == DType::fp16 ? 4e-4 : 2.5e-3;
  }
  std::string compare_word() const {
    int word = 0, want = 0;
    std::memcpy(&word, download(args_.slot_error, sizeof word).data(), sizeof word);
    for (std::size_t n = 0; n < sequences_.size(); ++n)
      if (sequences_[n].fate == Fate::refused) want = static_cast<int>(n) + 1;
    if (word == want) return {};
    return "slot_error is " + std::to_string(word) + ", expected " + std::to_string(want);
  }
  std::string compare_output(const reference::Array& expected) const {
    const std::size_t element = static_cast<std::size_t>(size_of(p_.dtype));
    const reference::Array o =
        unpack(download(args_.o.data, expected.size() * element), file_dtype(p_.dtype));
    const auto row = static_cast<std::ptrdiff_t>(p_.value_heads) * p_.value_dim;
    for (std::size_t n = 0; n < sequences_.size(); ++n) {
      const auto [begin, end] = span(n);
      const reference::Array got(o.begin() + begin * row, o.begin() + end * row);
      const reference::Array want(expected.begin() + begin * row, expected.begin() + end * row);
      if (sequences_[n].fate == Fate::runs) {
        const double error = reference::relative_error(got, want);
        if (!(error <= error_bound(p_.dtype)))
          return "o of sequence " + std::to_string(n) + " is off by " + std::to_string(error);
      } else if (std::any_of(got.begin(), got.end(), [](double x) { return x != 0; })) {
        return "o of sequence " + std::to_string(n) + " is not 0";
      }
    }
    return {};
  }
  std::string compare_update(const char* name, const void* data, const reference::Array& expected, int heads,
                             int dim) const {
    const reference::Array all = unpack(download(data, expected.size() * 4), file_dtype(DType::fp32));
    const auto row = static_cast<std::ptrdiff_t>(heads) * dim;
    for (std::size_t n = 0; n < sequences_.size(); ++n) {
      const auto [begin, end] = span(n);
      const reference::Array got(all.begin() + begin * row, all.begin() + end * row),
          want(expected.begin() + begin * row, expected.begin() + end * row);
      if (sequences_[n].fate != Fate::runs) {
        if (!std::all_of(got.begin(), got.end(), [](double x) { return std::isnan(x); }))
          return std::string(name) + " of sequence " + std::to_string(n) +
                 ", which does not run, was written";
      } else if (const double error = reference::relative_error(got, want); !(error <= 2e-5)) {
        return std::string(name) + " of sequence " + std::to_string(n) + " is off by " +
               std::to_string(error);
      }
    }
    return {};
  }
  /// The state of sequence n for its write slot number i.
  reference::Array expected_state(std::size_t n, std::size_t i) const {
    const auto per_slot = static_cast<std::size_t>(p_.value_heads) * matrix();
    const auto cut = [&](const reference::Array& from, std::size_t at) {
      const auto begin = from.begin() + static_cast<std::ptrdiff_t>(at * per_slot);
      return reference::Array(begin, begin + static_cast<std::ptrdiff_t>(per_slot));
    };
    if (p_.operation == Operation::replay)
      return cut(reference::replay(case_.inputs, expected_, call_.accepted, parents_), n);
    const auto [begin, end] = span(n);
    if (begin == end) return cut(case_.inputs.initial_state, n);
    return cut(expected_.states, static_cast<std::size_t>(p_.every_state ? begin : end - 1) + i);
  }
  std::string compare_pools() const {
    if (args_.final_state.data == nullptr) return {};
    Bytes want = call_.in_place ? initial_ : final_;
    const void* const data = call_.far_base != nullptr ? far_data() : args_.final_state.data;
    const Bytes got = download(data, want.size());
    for (std::size_t n = 0; n < sequences_.size(); ++n)
      for (std::size_t i = 0; i < sequences_[n].write.size(); ++i) {
        const std::int64_t slot = sequences_[n].write[i];
        if (slot < 0) continue;
        const double error = reference::relative_error(get(got, slot), expected_state(n, i));
        if (!(error <= error_bound(p_.state_dtype)))
          return "state " + std::to_string(i) + " of sequence " + std::to_string(n) + " is off by " +
                 std::to_string(error);
        const auto at = static_cast<std::ptrdiff_t>(static_cast<std::size_t>(slot) * slot_bytes());
        std::copy_n(got.begin() + at, slot_bytes() - static_cast<std::size_t>(call_.gap), want.begin() + at);
      }
    const auto [a, b] = std::mismatch(got.begin(), got.end(), want.begin());
    if (a == got.end()) return {};
    return "byte " + std::to_string(a - got.begin()) + " of the pool was written";
  }

  const Backend& backend_;
  const PoolCall& call_;
  TestCase case_;
  const Problem& p_;
  std::vector<Sequence> sequences_;
  reference::Verified expected_;
  std::vector<std::int64_t> parents_; ///< on the flattened token axis
  Bytes initial_, final_;
  KernelArgs args_{};
  std::vector<void*> all_;
};

/// Empty, or what a call did wrong.
inline std::string run_pool(const Backend& backend, const PoolCall& call, const Variant& variant) {
  return PoolRun(backend, call).run(variant);
}

/// States of 128 x 128 in fp32, in place, that lie `slot` slots of `stride` elements behind the pool's first
/// one.
struct FarSlot {
  int heads;
  std::int64_t slot, stride, slots;
  std::vector<std::int64_t> lengths, read, write; ///< packed sequences; slots behind `slot`
  bool every_state = false;

  [[nodiscard]] std::size_t bytes() const {
    return static_cast<std::size_t>((slot + slots) * stride) * sizeof(float);
  }
};
/// In memory of the device, as many bytes.
inline std::string run_far_slot(const Backend& backend, const Variant& variant, StateLayout layout,
                                const FarSlot& far, void* memory) {
  PoolCall c;
  Problem& p = c.options.problem;
  p.operation = Operation::recurrent;
  p.heads = p.value_heads = far.heads;
  p.dtype = p.gate_dtype = p.beta_dtype = DType::fp32;
  p.state_pool = p.varlen = true;
  p.every_state = far.every_state;
  p.state_layout = layout;
  c.options.lengths = far.lengths;
  c.slots = far.slots;
  c.read = far.read;
  c.write = far.write;
  c.columns = static_cast<std::int64_t>(far.write.size() / far.lengths.size());
  c.far_slot = far.slot;
  c.far_stride = far.stride;
  c.far_base = static_cast<float*>(memory);
  return run_pool(backend, c, variant);
}
/// In host memory that a kernel can read; only the pages that are touched exist.
inline std::string run_far_slot(const Backend& backend, const Variant& variant, StateLayout layout,
                                const FarSlot& far) {
  void* const map =
      mmap(nullptr, far.bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) return "no address space";
  std::string wrong = run_far_slot(backend, variant, layout, far, map);
  munmap(map, far.bytes());
  return wrong;
}
/// 2.4e9 to 2.7e9 elements behind the first one: a slot padded as a server pads it (B15), the states after
/// every token (B16), and a sequence without tokens, whose state is copied from slot to slot (B29).
inline std::vector<FarSlot> far_slots() {
  constexpr std::int64_t kOf12 = 12 * 128 * 128, kOf32 = 32 * 128 * 128;
  return {{32, 5'000, 540'672, 1, {1}, {0}, {0}},
          {12, 12'000, kOf12, 2, {2}, {0}, {0, 1}, true},
          {32, 5'000, kOf32, 3, {0, 1}, {0, 2}, {1, 2}}};
}

} // namespace kda::test

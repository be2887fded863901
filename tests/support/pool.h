#pragma once
// Calls of the recurrence whose states lie in a pool of slots, on any backend, against the float64 recurrence
// of each sequence. Whatever no slot number names must keep its bits: other slots, gaps between slots.
#include "kda/case_io.h"
#include "random_case.h"
#include "run_case.h"
#include <algorithm>
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
  std::int64_t slots = 6;                ///< of each pool
  bool in_place = true;                  ///< one pool, else two
  std::vector<std::int64_t> read, write; ///< a sequence; empty: no initial_state, no final_state
  std::int64_t table_stride = 1;         ///< elements from one slot number to the next
  std::int64_t gap = 0;                  ///< bytes behind each slot, a multiple of 16
  /// fp32, in place, host memory: the pool begins `far_slot` slots of `far_stride` elements behind this, and
  /// so do its numbers.
  float* far_base = nullptr;
  std::int64_t far_slot = 0, far_stride = 0;
};

/// What the contract in kda/engine.h says becomes of a sequence.
enum class Fate : std::uint8_t { runs, padding, refused };
struct Sequence {
  Fate fate = Fate::runs;
  std::int64_t read = -1, write = -1; ///< -1: none
};

class PoolRun {
public:
  PoolRun(const Backend& backend, const PoolCall& call)
      : backend_(backend), call_(call), case_(random_case(call.options)), p_(call.options.problem) {
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
    const reference::Outputs expected = reference::recurrence(case_.inputs);
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
    return compare(expected);
  }

private:
  using Bytes = std::vector<std::byte>;

  Sequence sequence(std::size_t i) const {
    const auto padding = [&](std::int64_t slot) {
      const PaddingPolicy x = call_.padding;
      return (slot < 0 && (x == PaddingPolicy::negative || x == PaddingPolicy::both)) ||
             (slot == 0 && (x == PaddingPolicy::zero || x == PaddingPolicy::both));
    };
    const auto outside = [&](std::int64_t slot) { return slot < 0 || slot >= call_.slots; };
    const bool reads = !call_.read.empty(), writes = !call_.write.empty();
    if (reads ? padding(call_.read[i]) : writes && padding(call_.write[i])) return {Fate::padding};
    const bool keeps = writes && !padding(call_.write[i]);
    if ((reads && outside(call_.read[i])) || (keeps && outside(call_.write[i]))) return {Fate::refused};
    return {Fate::runs, reads ? call_.read[i] : -1, keeps ? call_.write[i] : -1};
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
  NumberTable table(const std::vector<std::int64_t>& slots) {
    const auto stride = static_cast<std::size_t>(call_.table_stride);
    std::vector<std::int64_t> wide(slots.size() * stride, 1'000'000); // what lies between is no slot
    for (std::size_t i = 0; i < slots.size(); ++i)
      wide[i * stride] = slots[i] + call_.far_slot;
    const std::vector<std::int32_t> narrow(wide.begin(), wide.end());
    const bool is_wide = call_.type == IndexType::int64;
    const void* const data =
        is_wide ? upload(wide.data(), wide.size() * 8) : upload(narrow.data(), narrow.size() * 4);
    return {data, call_.table_stride, is_wide ? 1 : 0};
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
    args_.scale = static_cast<float>(in.scale == 0 ? 1 / std::sqrt(p_.key_dim) : in.scale);
    args_.lower_bound = static_cast<float>(in.lower_bound);
    const auto stride = static_cast<long long>(slot_bytes()) / size_of(p_.state_dtype);
    const auto head = static_cast<long long>(matrix());
    if (!call_.read.empty()) {
      args_.initial_state = {upload(initial_.data(), initial_.size()), stride, head};
      args_.read_slots = table(call_.read);
      args_.read_pool = call_.slots + call_.far_slot;
    }
    if (!call_.write.empty()) {
      void* const data = call_.in_place ? args_.initial_state.data : upload(final_.data(), final_.size());
      args_.final_state = {data, stride, head};
      args_.write_slots = table(call_.write);
      args_.write_pool = call_.slots + call_.far_slot;
    }
    if (call_.far_base != nullptr) {
      std::memcpy(far_data(), initial_.data(), initial_.size());
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
  std::string compare(const reference::Outputs& expected) const {
    int word = 0, want = 0;
    std::memcpy(&word, download(args_.slot_error, sizeof word).data(), sizeof word);
    for (std::size_t n = 0; n < sequences_.size(); ++n)
      if (sequences_[n].fate == Fate::refused) want = static_cast<int>(n) + 1;
    if (word != want) return "slot_error is " + std::to_string(word) + ", expected " + std::to_string(want);
    std::string wrong = compare_output(expected.o);
    if (wrong.empty()) wrong = compare_pools(expected.final_state);
    return wrong;
  }
  std::string compare_output(const reference::Array& expected) const {
    const std::size_t element = static_cast<std::size_t>(size_of(p_.dtype));
    const reference::Array o =
        unpack(download(args_.o.data, expected.size() * element), file_dtype(p_.dtype));
    const auto row = static_cast<std::ptrdiff_t>(p_.value_heads) * p_.value_dim;
    for (std::size_t n = 0; n < sequences_.size(); ++n) {
      const std::int64_t t = case_.inputs.sizes.tokens, i = static_cast<std::int64_t>(n);
      const std::int64_t begin = p_.varlen ? case_.inputs.cu_seqlens[n] : i * t,
                         end = p_.varlen ? case_.inputs.cu_seqlens[n + 1] : i * t + t;
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
  std::string compare_pools(const reference::Array& expected) const {
    if (args_.final_state.data == nullptr) return {};
    Bytes want = call_.in_place ? initial_ : final_;
    const void* const data = call_.far_base != nullptr ? far_data() : args_.final_state.data;
    const Bytes got = download(data, want.size());
    const auto per_slot = static_cast<std::size_t>(p_.value_heads) * matrix();
    for (std::size_t n = 0; n < sequences_.size(); ++n) {
      const std::int64_t slot = sequences_[n].write;
      if (slot < 0) continue;
      const auto begin = expected.begin() + static_cast<std::ptrdiff_t>(n * per_slot);
      const double error =
          reference::relative_error(get(got, slot), {begin, begin + static_cast<std::ptrdiff_t>(per_slot)});
      if (!(error <= error_bound(p_.state_dtype)))
        return "the state of sequence " + std::to_string(n) + " is off by " + std::to_string(error);
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
  Bytes initial_, final_;
  KernelArgs args_{};
  std::vector<void*> all_;
};

/// Empty, or what a call did wrong.
inline std::string run_pool(const Backend& backend, const PoolCall& call, const Variant& variant) {
  return PoolRun(backend, call).run(variant);
}

/// Slot 5,000 of 32 heads of 128 x 128 in fp32, padded as a server pads them: 2.7e9 elements from the first.
/// Only the pages that are touched take memory.
inline std::string run_far_slot(const Backend& backend, const Variant& variant, StateLayout layout) {
  PoolCall c;
  Problem& p = c.options.problem;
  p.operation = Operation::recurrent;
  p.heads = p.value_heads = 32;
  p.dtype = p.gate_dtype = p.beta_dtype = DType::fp32;
  p.state_pool = true;
  p.state_layout = layout;
  c.options.tokens = 1;
  c.slots = 1;
  c.read = c.write = {0};
  c.far_slot = 5'000;
  c.far_stride = 540'672;
  const auto bytes = static_cast<std::size_t>((c.far_slot + 1) * c.far_stride) * sizeof(float);
  void* const map =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) return "no address space";
  c.far_base = static_cast<float*>(map);
  std::string wrong = run_pool(backend, c, variant);
  munmap(map, bytes);
  return wrong;
}

} // namespace kda::test

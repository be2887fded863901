// Ranks that tune together choose alike, whatever each of them measures or has stored.
#include "tuned.h"
#include <condition_variable>
#include <mutex>
#include <thread>

using namespace kda;
using namespace kda::test;
using cache::test::Scratch;

namespace {

/// An all-reduce with max among the threads of a test.
class Ranks {
public:
  explicit Ranks(int count) : count_(count) {}
  [[nodiscard]] TuneReduce hook() {
    return [this](std::span<double> values) -> Status {
      std::unique_lock lock(mutex_);
      const int round = round_;
      if (arrived_ == 0) most_.assign(values.begin(), values.end());
      if (values.size() != most_.size()) return fail(ErrorCode::internal, "ranks reduce different numbers");
      for (std::size_t i = 0; i < values.size(); ++i)
        most_[i] = std::max(most_[i], values[i]);
      if (++arrived_ == count_) {
        result_ = most_;
        arrived_ = 0;
        ++round_;
        all_here_.notify_all();
      } else if (!all_here_.wait_for(lock, std::chrono::seconds(20), [&] { return round_ != round; })) {
        return fail(ErrorCode::internal, "a rank did not come");
      }
      std::copy(result_.begin(), result_.end(), values.begin());
      return {};
    };
  }
  [[nodiscard]] int rounds() const { return round_; }

private:
  const int count_;
  std::mutex mutex_;
  std::condition_variable all_here_;
  int arrived_ = 0, round_ = 0;
  std::vector<double> most_, result_;
};

/// Two ranks: each with a device and a cache of its own.
struct Pair {
  Tuned ranks[2];
  Scratch scratch[2];
  Pair() {
    ranks[0].backend->id_ = "rank 0";
    ranks[1].backend->id_ = "rank 1";
  }
  [[nodiscard]] EngineOptions options(int rank, TuneMode mode) const {
    EngineOptions o = options_on(ranks[rank].backend, scratch[rank].path());
    o.tune = mode;
    return o;
  }
  /// What each rank's prepare takes.
  [[nodiscard]] std::pair<std::string, std::string> prepare(TuneMode mode, const TuneReduce& reduce) const {
    std::string variant[2];
    {
      std::vector<std::jthread> threads;
      for (const int rank : {0, 1})
        threads.emplace_back([&, rank] {
          EngineOptions o = options(rank, mode);
          o.tune_reduce = reduce;
          const Engine engine = Engine::create(o).value();
          const auto kernel = engine.prepare(engine.plan(ranks[rank].problem, kScripted, kSizes).value());
          variant[rank] = kernel ? kernel->info().variant : kernel.error().message;
        });
    }
    return {variant[0], variant[1]};
  }
};

} // namespace

TEST_CASE("ranks that measure different times choose the variant whose slowest rank is fastest") {
  Pair pair;
  const std::string a = pair.ranks[0].others()[0], b = pair.ranks[0].others()[1];
  pair.ranks[0].times = {{a, 5}, {b, 6}};
  pair.ranks[1].times = {{a, 6.5}, {b, 5}};
  // Alone they differ: the noise would have one rank wait for what the other does not send.
  const auto alone = pair.prepare(TuneMode::force, {});
  CHECK(alone.first == a);
  CHECK(alone.second == b);
  Ranks ranks(2);
  const auto together = pair.prepare(TuneMode::force, ranks.hook());
  CHECK(together.first == b);
  CHECK(together.second == b);
  CHECK(ranks.rounds() == 2);
}

TEST_CASE("a rank that has the rows and one that has none tune together") {
  Pair pair;
  const std::string a = pair.ranks[0].others()[0], b = pair.ranks[0].others()[1];
  pair.ranks[0].times = pair.ranks[1].times = {{a, 5}};
  (void)pair.ranks[0].tune(Engine::create(pair.options(0, TuneMode::cached)).value());
  pair.ranks[0].times = pair.ranks[1].times = {{b, 5}};
  Ranks ranks(2);
  const auto together = pair.prepare(TuneMode::on, ranks.hook());
  CHECK(together.first == b); // its rows said a
  CHECK(together.second == b);
  const int launches = pair.ranks[0].backend->launches + pair.ranks[1].backend->launches;
  CHECK(pair.prepare(TuneMode::on, ranks.hook()) == together); // now both have them
  CHECK(pair.ranks[0].backend->launches + pair.ranks[1].backend->launches == launches);
}

TEST_CASE("a rank without memory does not keep the others waiting, and all take the untuned choice") {
  Pair pair;
  pair.ranks[0].times = pair.ranks[1].times = {{pair.ranks[0].other(), 5}};
  pair.ranks[1].backend->memory_limit = std::size_t{1} << 20U;
  Ranks ranks(2);
  const auto together = pair.prepare(TuneMode::on, ranks.hook());
  CHECK(together.first == pair.ranks[0].standard);
  CHECK(together.second == pair.ranks[0].standard);
}

TEST_CASE("a variant that is wrong on one rank is chosen on none") {
  Pair pair;
  const std::string liar = pair.ranks[0].other();
  pair.ranks[0].times = pair.ranks[1].times = {{liar, 5}};
  pair.ranks[1].backend->on_launch = [&](const SourceUnit& unit, const Launch&, const KernelArgs& a) {
    return pair.ranks[1].variant_of(unit) == liar ? Status{} : compute(a);
  };
  Ranks ranks(2);
  const auto together = pair.prepare(TuneMode::force, ranks.hook());
  CHECK(together.first == pair.ranks[0].standard);
  CHECK(together.second == pair.ranks[0].standard);
}

TEST_CASE("a reduce hook that fails leaves the untuned choice") {
  Pair pair;
  pair.ranks[0].times = {{pair.ranks[0].other(), 5}};
  EngineOptions options = pair.options(0, TuneMode::on);
  options.tune_reduce = [](std::span<double>) -> Status {
    return fail(ErrorCode::unavailable, "no network");
  };
  const Engine engine = Engine::create(options).value();
  const auto kernel = engine.prepare(engine.plan(pair.ranks[0].problem, kScripted, kSizes).value());
  CHECK(kernel.value().info().variant == pair.ranks[0].standard);
  CHECK(engine.reports().value().empty());
}

TEST_CASE("without a hook equal times are decided by the order of the estimates, alike everywhere") {
  Pair pair;
  for (Tuned& rank : pair.ranks)
    for (const std::string& variant : rank.others())
      rank.times[variant] = 5;
  const auto alone = pair.prepare(TuneMode::force, {});
  CHECK(alone.first != pair.ranks[0].standard);
  CHECK(alone.first == alone.second);
}

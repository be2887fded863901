#pragma once
// Option matrices without the full product: rows in which every two values of two options meet at least once.
#include <cstddef>
#include <random>
#include <set>
#include <tuple>
#include <vector>

namespace kda::test {

/// Rows of indices, element i below sizes[i]. Greedy, deterministic.
inline std::vector<std::vector<int>> pairwise(const std::vector<int>& sizes) {
  std::set<std::tuple<std::size_t, int, std::size_t, int>> open;
  for (std::size_t a = 0; a < sizes.size(); ++a)
    for (std::size_t b = a + 1; b < sizes.size(); ++b)
      for (int x = 0; x < sizes[a]; ++x)
        for (int y = 0; y < sizes[b]; ++y)
          open.insert({a, x, b, y});
  std::mt19937 random(1);
  const auto pairs_of = [](const std::vector<int>& row, const auto& visit) {
    for (std::size_t a = 0; a < row.size(); ++a)
      for (std::size_t b = a + 1; b < row.size(); ++b)
        visit(std::tuple{a, row[a], b, row[b]});
  };
  std::vector<std::vector<int>> rows;
  while (!open.empty()) {
    std::vector<int> best;
    std::size_t most = 0;
    for (int attempt = 0; attempt < 40; ++attempt) {
      std::vector<int> row;
      for (const int size : sizes)
        row.push_back(static_cast<int>(random() % static_cast<unsigned>(size)));
      // One open pair is always in, so that every row makes progress.
      const auto& [a, x, b, y] = *open.begin();
      row[a] = x;
      row[b] = y;
      std::size_t covered = 0;
      pairs_of(row, [&](const auto& pair) { covered += open.count(pair); });
      if (covered > most) {
        most = covered;
        best = row;
      }
    }
    pairs_of(best, [&](const auto& pair) { open.erase(pair); });
    rows.push_back(best);
  }
  return rows;
}

} // namespace kda::test

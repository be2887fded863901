// kda-jit cache: what the persistent cache holds, whether it is sound, and a way to empty it.
#include "cache/store.h"
#include "command.h"
#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <optional>

namespace kda::tools {
namespace {

/// The store of the environment's cache directory.
Result<std::unique_ptr<cache::Store>> open_store() {
  const auto options = EngineOptions::from_environment();
  if (!options) return tl::unexpected(options.error());
  cache::StoreOptions store;
  store.directory = options->cache_directory ? *options->cache_directory : cache::default_directory();
  store.read_only = options->read_only_caches;
  store.packs = options->cache_packs;
  store.max_bytes = options->cache_max_bytes;
  store.warn = [](const std::string& text) { fmt::print(stderr, "kda-jit: {}\n", text); };
  return std::make_unique<cache::Store>(std::move(store));
}

struct PackOptions {
  std::string file;
  std::vector<std::string> architectures;
  bool json = false;
};

nlohmann::json describe(const cache::PackInfo& pack) {
  nlohmann::json labels;
  for (const auto& [name, value] : pack.labels)
    labels[name].push_back(value);
  return {{"schema", 1},         {"file", pack.file.string()}, {"entries", pack.entries},
          {"bytes", pack.bytes}, {"digest", pack.digest},      {"labels", labels}};
}

void print_pack(const cache::PackInfo& pack) {
  fmt::print("pack      {}\n          {} entries, {} bytes, digest {}\n", pack.file.string(), pack.entries,
             pack.bytes, pack.digest);
  for (const auto& [name, value] : pack.labels)
    if (!value.empty()) fmt::print("          {} {}\n", name, value);
}

int stat(bool json) {
  const auto store = open_store();
  if (!store) return report_error(store.error());
  const cache::StoreStats stats = (*store)->stats();
  const std::string directory = (*store)->directory().string();
  if (json) {
    nlohmann::json packs = nlohmann::json::array();
    for (const cache::PackInfo& pack : (*store)->packs())
      packs.push_back(describe(pack));
    const nlohmann::json out{{"schema", 1},
                             {"directory", directory},
                             {"entries", stats.entries},
                             {"bytes", stats.bytes},
                             {"packs", packs}};
    fmt::print("{}\n", out.dump(1));
  } else {
    fmt::print("directory {}\nentries   {}\nbytes     {}\n",
               directory.empty() ? "none (memory only)" : directory, stats.entries, stats.bytes);
    for (const cache::PackInfo& pack : (*store)->packs())
      print_pack(pack);
  }
  return kOk;
}

int pack(const PackOptions& o) {
  const auto store = open_store();
  if (!store) return report_error(store.error());
  const auto info = (*store)->pack(o.file, {{}, {o.architectures.begin(), o.architectures.end()}});
  if (!info) return report_error({ErrorCode::io_error, info.error(), {}});
  if (o.json)
    fmt::print("{}\n", describe(*info).dump(1));
  else
    print_pack(*info);
  return kOk;
}

int unpack(const PackOptions& o) {
  const auto store = open_store();
  if (!store) return report_error(store.error());
  const auto report = (*store)->unpack(o.file);
  if (!report) return report_error({ErrorCode::io_error, report.error(), {}});
  if (o.json)
    fmt::print("{}\n", nlohmann::json{{"schema", 1},
                                      {"directory", (*store)->directory().string()},
                                      {"added", report->added},
                                      {"present", report->present}}
                           .dump(1));
  else
    fmt::print("{} entries added, {} were there; directory {}\n", report->added, report->present,
               (*store)->directory().string());
  return kOk;
}

int verify(bool remove, bool json) {
  const auto store = open_store();
  if (!store) return report_error(store.error());
  const cache::VerifyReport report = (*store)->verify(remove);
  if (json) {
    const nlohmann::json out{{"schema", 1}, {"good", report.good}, {"bad", report.bad}, {"removed", remove}};
    fmt::print("{}\n", out.dump(1));
  } else {
    for (const std::string& bad : report.bad)
      fmt::print("bad: {}\n", bad);
    fmt::print(
        "{} good, {} bad{}\n", report.good, report.bad.size(),
        report.bad.empty() ? "" : (remove ? ", removed" : "; `kda-jit cache verify --remove` removes them"));
  }
  return report.bad.empty() || remove ? kOk : kFailed;
}

int prune(const std::optional<double>& megabytes, bool json) {
  const auto options = EngineOptions::from_environment();
  const auto store = open_store();
  if (!store) return report_error(store.error());
  const std::uint64_t limit = megabytes ? static_cast<std::uint64_t>(std::min(*megabytes * 0x1p20, 0x1p63))
                                        : options->cache_max_bytes;
  const cache::PruneReport report = (*store)->prune(limit);
  if (json)
    fmt::print("{}\n", nlohmann::json{{"schema", 1},
                                      {"removed", report.removed},
                                      {"interrupted", report.interrupted},
                                      {"freed_bytes", report.freed},
                                      {"bytes", report.bytes},
                                      {"max_bytes", limit}}
                           .dump(1));
  else
    fmt::print("removed {} entries ({} bytes) and {} files of interrupted writes; {} bytes are left{}\n",
               report.removed, report.freed, report.interrupted, report.bytes,
               limit != 0 && report.bytes > limit ? ", all used in the last five minutes" : "");
  return kOk;
}

int clear() {
  const auto store = open_store();
  if (!store) return report_error(store.error());
  fmt::print("removed {} entries; tuning rows stay\n", (*store)->clear());
  return kOk;
}

} // namespace

void add_cache(CLI::App& app, int& exit) {
  auto* const sub = app.add_subcommand("cache", "Look after the persistent cache (KDA_JIT_CACHE_DIR)");
  sub->require_subcommand(1);
  auto json = std::make_shared<bool>(false);
  auto remove = std::make_shared<bool>(false);
  auto* const stat_command = sub->add_subcommand("stat", "Directory, entries and bytes");
  stat_command->add_flag("--json", *json, "JSON on stdout");
  stat_command->callback([json, &exit] { exit = stat(*json); });
  auto* const verify_command = sub->add_subcommand(
      "verify", "Check every entry, also of the packs in use; exit code 1 when one is bad");
  verify_command->add_flag("--json", *json, "JSON on stdout");
  verify_command->add_flag("--remove", *remove, "remove bad entries");
  verify_command->callback([json, remove, &exit] { exit = verify(*remove, *json); });
  auto* const prune_command = sub->add_subcommand(
      "prune", "Remove the entries least recently used until the cache is below its limit");
  auto megabytes = std::make_shared<std::optional<double>>();
  prune_command->add_option("--max-mb", *megabytes, "the limit (default: KDA_JIT_CACHE_MAX_MB; 0: none)")
      ->check(CLI::NonNegativeNumber);
  prune_command->add_flag("--json", *json, "JSON on stdout");
  prune_command->footer("Every publish does this by itself. What was used in the last five minutes stays.");
  prune_command->callback([megabytes, json, &exit] { exit = prune(*megabytes, *json); });
  auto packing = std::make_shared<PackOptions>();
  auto* const pack_command = sub->add_subcommand(
      "pack", "Write what the cache holds into one read-only file, for KDA_JIT_CACHE_PACKS or unpack");
  pack_command->add_option("file", packing->file, "the file to write, e.g. kernels.kdapack")->required();
  pack_command
      ->add_option("--arch", packing->architectures, "only entries of these architectures, comma separated")
      ->delimiter(',');
  pack_command->add_flag("--json", packing->json, "JSON on stdout");
  pack_command->footer(
      "Damaged entries are left out, with a warning. Equal entries give an equal file; its "
      "digest covers every byte.\nExit code 1, and no file, when there is nothing to pack or "
      "it cannot be written.");
  pack_command->callback([packing, &exit] { exit = pack(*packing); });
  auto* const unpack_command =
      sub->add_subcommand("unpack", "Put every entry of a pack into the cache directory");
  unpack_command->add_option("file", packing->file, "a file that `kda-jit cache pack` wrote")->required();
  unpack_command->add_flag("--json", packing->json, "JSON on stdout");
  unpack_command->footer(
      "The whole pack is verified first: exit code 1, and nothing added, when any of it is "
      "damaged or of another format.");
  unpack_command->callback([packing, &exit] { exit = unpack(*packing); });
  sub->add_subcommand("clear", "Remove every entry")->callback([&exit] { exit = clear(); });
}

} // namespace kda::tools

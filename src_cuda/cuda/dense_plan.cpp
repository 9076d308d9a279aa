// What the brain launch of dense connectomes reads: the sources of every tile, each once for all sums that it enters,
// and the order in which blocks of weights get room in shared memory.
#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "model.h"

namespace neurogen::cuda {
namespace {

constexpr int kDenseTerms = 32;  // of a tile on average, for a connectome to count as dense
constexpr double kGolden = 0.6180339887498949;

}  // namespace

void CudaModel::lay_out_dense(int64_t terms) {
  const bool wanted = brain_wanted_ == "dense" || (brain_wanted_ == "" && terms >= kDenseTerms * tiles_);
  if (!spec_.bf16 || !wanted) return;
  const char* part = "connectome";
  dense_tiles_ = arena_.take<DenseTile>(part, tiles_);
  dense_sources_ = arena_.take<DenseSource>(part, terms);
  dense_shares_ = arena_.take<DenseShare>(part, tiles_);
  dense_blocks_ = arena_.take<int32_t>(part, terms);
  dense_weights_ = take_real("copies of weights for products", terms * kBlockArea);
}

// terms: of a tile, by kind; work: terms of a tile of every region. The sources that were spoken longest ago come
// first, and of those of one tick the ones whose tiles have the least to do. Tiles of a region begin at different
// sources, so that they do not all read the same memory at once.
std::vector<DenseSource> CudaModel::dense_sources(const TileName& name,
                                                  const std::array<std::vector<Term>, kSums>& terms,
                                                  const std::vector<size_t>& work) const {
  const RegionView& receiver = regions_[name.region];
  std::vector<DenseSource> out;
  std::map<std::pair<const void*, int32_t>, size_t> known;
  for (int kind = 0; kind < kSums; ++kind) {
    for (const Term& term : terms[kind]) {
      const auto [entry, fresh] = known.try_emplace({term.source, term.delay}, out.size());
      if (fresh) out.push_back({term.source, term.delay, term.region, term.panel, {-1, -1, -1}});
      out[entry->second].place[kind] = term.block;  // for now
    }
  }
  const auto spoken = [&](const DenseSource& x) {
    return std::pair(x.delay + receiver.rank - regions_[x.region].rank, -static_cast<int64_t>(work[x.region]));
  };
  std::stable_sort(out.begin(), out.end(),
                   [&](const DenseSource& x, const DenseSource& y) { return spoken(x) > spoken(y); });
  for (auto begin = out.begin(); begin != out.end();) {
    const auto end = std::find_if(begin, out.end(), [&](const DenseSource& x) { return spoken(x) != spoken(*begin); });
    std::rotate(begin, begin + (end - begin) * name.offset / receiver.n, end);
    begin = end;
  }
  return out;
}

// owned: the tiles of every share.
void CudaModel::plan_dense(const std::vector<TileName>& names,
                           const std::vector<std::array<std::vector<Term>, kSums>>& brain,
                           const std::vector<std::vector<int>>& owned) {
  if (!dense_tiles_) return;
  std::vector<DenseTile> tiles;
  std::vector<DenseSource> sources;
  std::vector<int32_t> blocks;
  std::vector<size_t> work(regions_.size());
  for (int tile = 0; tile < tiles_; ++tile) {
    size_t terms = 0;
    for (const std::vector<Term>& some : brain[tile]) terms += some.size();
    work[names[tile].region] = std::max(work[names[tile].region], terms);
  }
  for (const std::vector<int>& mine : owned) {
    DenseShare share{};
    share.tile_begin = static_cast<int32_t>(tiles.size());
    share.source_begin = static_cast<int32_t>(sources.size());
    share.block_begin = static_cast<int32_t>(blocks.size());
    // Places in shared memory are dealt along the golden ratio: however many there are, those blocks that get none are
    // spread evenly over what a warp does.
    struct Use {
      double turn;
      int32_t* place;
    };
    std::vector<std::vector<DenseSource>> heard;
    std::vector<Use> uses;
    for (int tile : mine) heard.push_back(dense_sources(names[tile], brain[tile], work));
    for (size_t i = 0; i < mine.size(); ++i) {
      const BrainTile tile = brain_tile(names[mine[i]]);
      DenseTile entry{tile.u,      tile.s,      tile.emitted, tile.d,     tile.g, tile.constants,
                      tile.region, tile.offset, tile.rank,    tile.gated, 0,      0,
                      {}};
      entry.source_begin = share.sources;
      entry.sources = static_cast<int32_t>(heard[i].size());
      share.sources += entry.sources;
      for (int half = 0; half < kDenseHalves; ++half) {
        entry.list_begin[half] = static_cast<int32_t>(uses.size());
        for (size_t at = half; at < heard[i].size(); at += kDenseHalves) {
          for (int32_t& place : heard[i][at].place) {
            const double turn = static_cast<double>(uses.size()) * kGolden;
            if (place >= 0) uses.push_back({turn - std::floor(turn), &place});
          }
        }
      }
      tiles.push_back(entry);
    }
    std::stable_sort(uses.begin(), uses.end(), [](const Use& x, const Use& y) { return x.turn < y.turn; });
    for (const Use& use : uses) {
      blocks.push_back(*use.place);
      *use.place = share.blocks++;
    }
    for (const auto& some : heard) sources.insert(sources.end(), some.begin(), some.end());
    share.tiles = static_cast<int32_t>(mine.size());
    const size_t bytes = regions_.size() * (sizeof(RegionView) + sizeof(StateView)) +
                         share.tiles * (sizeof(DenseTile) + sizeof(float) * kTileConstants) +
                         share.sources * sizeof(DenseSource) +
                         (share.blocks + share.tiles * kDenseHalves) * sizeof(int32_t);
    share.table_bytes = static_cast<int32_t>((bytes + 127) / 128 * 128);
    shares_of_dense_.push_back(share);
  }
  upload(dense_tiles_, tiles);
  upload(dense_sources_, sources);
  upload(dense_shares_, shares_of_dense_);
  upload(dense_blocks_, blocks);
}

// Shared memory that the largest share needs, with all of its weights or with none.
size_t CudaModel::dense_bytes(int steps, bool with_weights) const {
  size_t most = 0;
  for (const DenseShare& share : shares_of_dense_) {
    most = std::max(most, share.table_bytes + kDenseFixedBytes + share.tiles * dense_state_bytes(steps) +
                              (with_weights ? share.blocks * kDenseBlockBytes : 0));
  }
  return most;
}

// Rows of execution_plan() that this launch answers.
void CudaModel::describe_dense(const DenseShape& shape, ExecutionPlan& plan) const {
  const auto largest = std::max_element(shares_of_dense_.begin(), shares_of_dense_.end(),
                                        [](const DenseShare& x, const DenseShare& y) { return x.blocks < y.blocks; });
  const size_t rest =
      shape.shared_bytes - largest->table_bytes - kDenseFixedBytes - largest->tiles * dense_state_bytes(shape.steps);
  const auto kib = [](size_t bytes) { return std::to_string((bytes + 512) >> 10) + " KiB"; };
  const size_t blocks = static_cast<size_t>(largest->blocks);
  const std::map<std::string, std::string> said = {
      {"brain launch", std::to_string(shape.grid) + " blocks of " + std::to_string(kDenseThreads) +
                           " threads for a dense connectome, shared memory of each: " + kib(shape.shared_bytes)},
      {"streams at a time", std::to_string(shape.group)},
      {"v and w", "in shared memory"},
      {"weights between neurons", kib(std::min(blocks, rest / kDenseBlockBytes) * kDenseBlockBytes) + " of " +
                                      kib(blocks * kDenseBlockBytes) +
                                      " in the shared memory of the block with the most, the rest is streamed"}};
  for (auto& [name, value] : plan) {
    if (const auto row = said.find(name); row != said.end()) value = row->second;
  }
}

}  // namespace neurogen::cuda

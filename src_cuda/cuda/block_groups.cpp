// Which blocks' gradients are computed together. A gradient is made of two panels, its sources' and its errors', and
// reading them is what it costs: a panel is read once a group. A block is an edge between its two panels, and a group
// is to have few of them for its edges, at best a tree. So a group grows by sources, with all of their blocks, that
// share most of their panels with it. For the 6,352 blocks of `base` that do not hear the embedding that is 6,555
// panels in 257 groups; by source it would be 7,616.
#include <algorithm>
#include <map>
#include <stdexcept>
#include <utility>

#include "connectome.h"

namespace neurogen::cuda {
namespace {

constexpr size_t kCandidates = 64;  // sources that are looked at before one is taken, at most

using Panel = std::pair<const void*, int32_t>;  // row 0 and delay: errors of two delays are two panels

// Numbers for panels, in the order in which they come.
struct Numbers {
  std::map<Panel, int> of;
  int operator()(const GroupPanel& p) {
    return of.emplace(Panel{p.row0, p.delay}, static_cast<int>(of.size())).first->second;
  }
};

}  // namespace

std::vector<BlockGroup> group_blocks(const std::vector<LearntBlock>& blocks, int most) {
  if (most < kLeastGroup || most > kGroupBlocks) throw std::logic_error("group_blocks: too many or few blocks a group");
  Numbers source_number, error_number;
  std::vector<std::vector<int>> left, heard_by;  // blocks of a source; sources that meet an error
  std::vector<int> error_of;                     // of a block
  for (size_t i = 0; i < blocks.size(); ++i) {
    const size_t source = source_number(blocks[i].source), error = error_number(blocks[i].error);
    left.resize(std::max(left.size(), source + 1)), heard_by.resize(std::max(heard_by.size(), error + 1));
    left[source].push_back(static_cast<int>(i));
    heard_by[error].push_back(static_cast<int>(source));
    error_of.push_back(static_cast<int>(error));
  }
  std::vector<BlockGroup> groups;
  std::vector<int> place(heard_by.size(), -1);  // of errors, in the group
  for (size_t first = 0; first < left.size();) {
    std::vector<GroupPanel> sources, errors;
    std::vector<int> placed, candidates;  // errors that have a place; sources that meet them
    std::vector<GroupBlock> taken;
    const auto shared = [&](int source) {
      return std::count_if(left[source].begin(), left[source].end(), [&](int i) { return place[error_of[i]] >= 0; });
    };
    const auto room_for_panels = [&] { return kGroupPanels - static_cast<int>(sources.size() + errors.size()); };
    for (bool whole = true; whole && static_cast<int>(taken.size()) < most;) {
      // The source with the largest part of its panels here; one that fits in before one that does not.
      int best = -1;
      std::pair<bool, double> rank;
      candidates.erase(std::remove_if(candidates.begin(), candidates.end(), [&](int s) { return left[s].empty(); }),
                       candidates.end());
      for (const int source : candidates) {
        const auto size = static_cast<int>(left[source].size());
        const auto here = static_cast<int>(shared(source));
        const std::pair<bool, double> some{
            static_cast<int>(taken.size()) + size <= most && size - here + 1 <= room_for_panels(),
            static_cast<double>(here) / (size + 1)};
        if (best < 0 || some > rank) best = source, rank = some;
      }
      if (best < 0) {
        while (first < left.size() && left[first].empty()) ++first;
        if (first == left.size()) break;
        best = static_cast<int>(first);
      }
      // As many of its blocks as fit in, those whose errors are here first.
      std::vector<int>& mine = left[best];
      std::stable_partition(mine.begin(), mine.end(), [&](int i) { return place[error_of[i]] >= 0; });
      size_t count = 0;
      for (const int i : mine) {
        const int error = error_of[i];
        const int more = (count == 0) + (place[error] < 0);
        if (static_cast<int>(taken.size()) == most || more > room_for_panels()) break;
        if (count == 0) sources.push_back(blocks[i].source);
        if (place[error] < 0) {
          place[error] = static_cast<int>(errors.size());
          errors.push_back(blocks[i].error), placed.push_back(error);
          for (const int other : heard_by[error]) {
            if (other != best && candidates.size() < kCandidates) candidates.push_back(other);
          }
        }
        taken.push_back(
            {blocks[i].block, static_cast<int16_t>(sources.size() - 1), static_cast<int16_t>(place[error])});
        ++count;
      }
      whole = count == mine.size();
      mine.erase(mine.begin(), mine.begin() + static_cast<std::ptrdiff_t>(count));
    }
    for (const int error : placed) place[error] = -1;
    if (taken.empty()) break;
    BlockGroup group{};
    group.sources = static_cast<int32_t>(sources.size());
    group.panels = static_cast<int32_t>(sources.size() + errors.size());
    group.blocks = static_cast<int32_t>(taken.size());
    std::copy(errors.begin(), errors.end(), std::copy(sources.begin(), sources.end(), group.panel));
    for (const GroupPanel& error : errors) group.longest_delay = std::max(group.longest_delay, error.delay);
    for (GroupBlock& some : taken) some.error = static_cast<int16_t>(some.error + group.sources);
    std::copy(taken.begin(), taken.end(), group.block);
    groups.push_back(group);
  }
  return groups;
}

}  // namespace neurogen::cuda

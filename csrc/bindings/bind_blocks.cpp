// SPDX-License-Identifier: Apache-2.0
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/operators.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "kvcached/block_allocator.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvc {
namespace {

using Pairs = std::vector<std::pair<int64_t, int64_t>>;

using Array = nb::ndarray<nb::numpy, int32_t, nb::ndim<1>>;

Array array(std::unique_ptr<std::vector<int32_t>> values) {
  std::vector<int32_t>* owned = values.release();
  const nb::capsule owner(owned,
                          [](void* p) noexcept { delete static_cast<std::vector<int32_t>*>(p); });
  return Array(owned->data(), {owned->size()}, owner);
}

Pairs pairs(const std::vector<BlockRange>& ranges) {
  Pairs out;
  out.reserve(ranges.size());
  for (const BlockRange& range : ranges) out.emplace_back(range.begin, range.end);
  return out;
}

void in_range(int64_t index, int64_t size, const char* name) {
  if (index < 0 || index >= size) {
    throw nb::index_error((std::string(name) + " " + std::to_string(index) + " is not in 0.." +
                           std::to_string(size - 1))
                              .c_str());
  }
}

void bind_geometry(nb::module_& m) {
  nb::class_<Geometry>(m, "Geometry",
                       "How blocks lie on pages; the same in every segment of an arena.")
      .def(
          "__init__",
          [](Geometry* self, int64_t block_bytes, int64_t page_bytes, int64_t num_blocks,
             int64_t segments) {
            const Geometry geometry{block_bytes, page_bytes, num_blocks, segments};
            check(geometry.validate());
            new (self) Geometry(geometry);
          },
          "block_bytes"_a, "page_bytes"_a, "num_blocks"_a, "segments"_a = 1)
      .def_ro("block_bytes", &Geometry::block_bytes)
      .def_ro("page_bytes", &Geometry::page_bytes)
      .def_ro("num_blocks", &Geometry::num_blocks)
      .def_ro("segments", &Geometry::segments)
      .def_prop_ro("pages_per_segment", &Geometry::pages_per_segment)
      .def_prop_ro("unit_bytes", &Geometry::unit_bytes,
                   "Device bytes of one page index: a page in every segment.")
      .def(
          "pages_of",
          [](const Geometry& self, int64_t block) {
            in_range(block, self.num_blocks, "block");
            const PageRun run = self.pages_of({block, block + 1});
            return std::pair(run.begin, run.end);
          },
          "block"_a, "The page indices [first, end) that a block touches.")
      .def(nb::self == nb::self)
      .def("__hash__",
           [](const Geometry& self) {
             return nb::hash(
                 nb::make_tuple(self.block_bytes, self.page_bytes, self.num_blocks, self.segments));
           })
      .def("__repr__", [](const Geometry& self) {
        return "Geometry(block_bytes=" + std::to_string(self.block_bytes) +
               ", page_bytes=" + std::to_string(self.page_bytes) +
               ", num_blocks=" + std::to_string(self.num_blocks) +
               ", segments=" + std::to_string(self.segments) + ")";
      });
}

}  // namespace

void bind_blocks(nb::module_& m) {
  bind_geometry(m);

  nb::class_<Growth>(m, "Growth", "Blocks committed or decommitted, and the pages that moved.")
      .def_prop_ro("ranges", [](const Growth& self) { return pairs(self.ranges); })
      .def_ro("page_delta", &Growth::page_delta,
              "Change of the committed page indices, per geometry.")
      .def_prop_ro("num_blocks", &Growth::num_blocks)
      .def("__bool__", [](const Growth& self) { return !self.ranges.empty(); });

  nb::class_<BlockAllocator>(m, "BlockAllocator",
                             "Which blocks have memory, and which are handed out next.")
      .def(nb::new_([](int64_t num_blocks, std::vector<Geometry> geometries) {
             std::unique_ptr<BlockAllocator> out;
             check(BlockAllocator::create(num_blocks, std::move(geometries), out));
             return out;
           }),
           "num_blocks"_a, "geometries"_a)
      .def(
          "grow",
          [](BlockAllocator& self, int64_t n) {
            Growth out;
            check(self.grow(n, out));
            return out;
          },
          "n"_a, "Commit blocks until n more are clean, or no uncommitted one is left.")
      .def(
          "cost",
          [](const BlockAllocator& self, int64_t n) {
            std::vector<int64_t> out;
            check(self.cost(n, out));
            return out;
          },
          "n"_a, "The page_delta that grow(n) would have.")
      .def(
          "undo",
          [](BlockAllocator& self, const Growth& growth) {
            Growth out;
            check(self.undo(growth, out));
            return out;
          },
          "growth"_a, "Take back the latest growth, none of whose blocks was allocated since.")
      .def(
          "shrink",
          [](BlockAllocator& self, int64_t max_bytes) {
            Growth out;
            check(self.shrink(max_bytes, out));
            return out;
          },
          "max_bytes"_a,
          "Decommit parked pages, highest first, until max_bytes of primary pages are free.")
      .def(
          "allocate",
          [](BlockAllocator& self, int64_t n) {
            std::vector<int32_t> out;
            check(self.allocate(n, out));
            return out;
          },
          "n"_a, "Make n clean blocks live, those on the fullest pages first.")
      .def(
          "allocate_beside",
          [](BlockAllocator& self, int64_t n, int64_t beside) {
            std::vector<int32_t> out;
            check(self.allocate_beside(n, beside, out));
            return out;
          },
          "n"_a, "beside"_a,
          "As allocate, but on the page of the live block beside (0: none) and on empty pages "
          "first.")
      .def(
          "free",
          [](BlockAllocator& self, const std::vector<int32_t>& blocks) {
            check(self.free(blocks));
          },
          "blocks"_a, "Make live blocks clean; blocks[0] is the first to be reused.")
      .def(
          "allocate_array",
          [](BlockAllocator& self, int64_t n) {
            auto out = std::make_unique<std::vector<int32_t>>();
            check(self.allocate(n, *out));
            return array(std::move(out));
          },
          "n"_a, "As allocate, into a numpy array of int32.")
      .def(
          "free_array",
          [](BlockAllocator& self,
             const nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>& blocks) {
            check(self.free({blocks.data(), blocks.shape(0)}));
          },
          // Converting would cut what does not fit, and copy behind the caller's back.
          "blocks"_a.noconvert(), "As free, from an array of int32.")
      .def(
          "live_array",
          [](const BlockAllocator& self) {
            auto out = std::make_unique<std::vector<int32_t>>(self.live_blocks());
            return array(std::move(out));
          },
          "Every live block but the null block, ascending, as a numpy array of int32.")
      .def(
          "emptied_by",
          [](const BlockAllocator& self, const std::vector<int32_t>& candidates, int64_t pages) {
            std::vector<int32_t> out;
            check(self.emptied_by(candidates, pages, out));
            return out;
          },
          "candidates"_a, "pages"_a,
          "Which live blocks to free, first candidates first, to empty that many pages whole.")
      .def_prop_ro("num_blocks", &BlockAllocator::num_blocks)
      .def_prop_ro("num_live", &BlockAllocator::num_live, "Includes the null block.")
      .def_prop_ro("num_clean", &BlockAllocator::num_clean)
      .def_prop_ro("num_uncommitted", &BlockAllocator::num_uncommitted)
      .def_prop_ro("parked_pages", &BlockAllocator::parked_pages,
                   "Committed primary pages that no live block touches.")
      .def_prop_ro("geometries",
                   [](const BlockAllocator& self) {
                     std::vector<Geometry> out;
                     for (const PageMap& map : self.maps()) out.push_back(map.geometry());
                     return out;
                   })
      .def(
          "committed_pages",
          [](const BlockAllocator& self, int64_t geometry) {
            in_range(geometry, static_cast<int64_t>(self.maps().size()), "geometry");
            return self.maps()[geometry].committed_pages();
          },
          "geometry"_a = 0, "Committed page indices of a geometry.")
      .def(
          "clean_beside",
          [](const BlockAllocator& self, int64_t block) {
            in_range(block, self.num_blocks(), "block");
            return self.clean_beside(block);
          },
          "block"_a, "Clean blocks on the page that is home to a block.")
      .def(
          "live_on_page",
          [](const BlockAllocator& self, int64_t page) {
            in_range(page, self.geometry().pages_per_segment(), "page");
            return self.live_on_page(page);
          },
          "page"_a, "Live blocks that touch a primary page.")
      .def(
          "pages_of",
          [](const BlockAllocator& self, int64_t block) {
            in_range(block, self.num_blocks(), "block");
            const PageRun run = self.geometry().pages_of({block, block + 1});
            return std::pair(run.begin, run.end);
          },
          "block"_a, "The primary page indices [first, end) that a block touches.")
      .def("free_order", &BlockAllocator::free_order,
           "Every clean block in the order allocate would return them; for debugging.");
}

}  // namespace kvc

// flash_attn_ext._introspect: plans, the kernel table and the functions of core/ as Python sees
// them. Host only: no torch, no CUDA.
//
// make_plan serves flash_attn_ext.explain, the command line and the README's table; the rest lets
// tests call the very functions that kernels call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "core/accum_layout.h"
#include "core/mask.h"
#include "core/page_table.h"
#include "core/philox.h"
#include "core/rotary.h"
#include "core/seqlen.h"
#include "core/split.h"
#include "core/swizzle.h"
#include "core/tile_config.h"
#include "core/tile_scheduler.h"
#include "plan/plan.h"

namespace py = pybind11;

namespace fa {
namespace {

// The enumerator in [0, count) whose name is `got`.
template <class Enum, class Name>
Enum parse_enum(const char* what, const std::string& got, int count, Name name) {
  std::string known;
  for (int i = 0; i < count; ++i) {
    if (got == name(static_cast<Enum>(i))) return static_cast<Enum>(i);
    known += (i ? ", " : "") + std::string(name(static_cast<Enum>(i)));
  }
  throw std::invalid_argument(std::string(what) + "='" + got + "': expected one of " + known);
}
Arch parse_arch(const std::string& got) {
  return parse_enum<Arch>("arch", got, kNumArchs, arch_name);
}
Family parse_family(const std::string& got) {
  return parse_enum<Family>("family", got, kNumFamilies, family_name);
}
DType parse_dtype(const std::string& got) {
  return parse_enum<DType>("dtype", got, kNumDTypes, dtype_name);
}

// Sets one integer or flag of a Problem from a Python object.
using Setter = void (*)(Problem& problem, const std::string& name, const py::handle& value);

template <auto kField>
void set_field(Problem& problem, const std::string& name, const py::handle& value) {
  auto& field = problem.*kField;
  try {
    field = value.cast<std::decay_t<decltype(field)>>();
  } catch (const py::cast_error&) {
    throw std::invalid_argument(name + "=" + py::repr(value).cast<std::string>() +
                                ": expected an integer of 32 bits, or a bool for a flag");
  }
}

const std::map<std::string, Setter>& problem_fields() {
  static const std::map<std::string, Setter> fields = {
      {"head_dim", set_field<&Problem::head_dim>},
      {"head_dim_v", set_field<&Problem::head_dim_v>},
      {"batch_size", set_field<&Problem::batch_size>},
      {"seqlen_q", set_field<&Problem::seqlen_q>},
      {"seqlen_k", set_field<&Problem::seqlen_k>},
      {"total_q", set_field<&Problem::total_q>},
      {"total_k", set_field<&Problem::total_k>},
      {"num_heads_q", set_field<&Problem::num_heads_q>},
      {"num_heads_kv", set_field<&Problem::num_heads_kv>},
      {"window_left", set_field<&Problem::window_left>},
      {"window_right", set_field<&Problem::window_right>},
      {"varlen", set_field<&Problem::varlen>},
      {"page_size", set_field<&Problem::page_size>},
      {"leftpad", set_field<&Problem::leftpad>},
      {"appends", set_field<&Problem::appends>},
      {"broadcast", set_field<&Problem::broadcast>},
      {"softcap", set_field<&Problem::softcap>},
      {"alibi", set_field<&Problem::alibi>},
      {"dropout", set_field<&Problem::dropout>},
      {"dmask", set_field<&Problem::dmask>},
      {"positive_scale", set_field<&Problem::positive_scale>},
      {"deterministic", set_field<&Problem::deterministic>},
      {"num_splits", set_field<&Problem::num_splits>},
      {"rotary_dim", set_field<&Problem::rotary_dim>},
      {"rotary_interleaved", set_field<&Problem::rotary_interleaved>},
      {"bias", set_field<&Problem::bias>},
      {"alignment_bytes", set_field<&Problem::alignment_bytes>},
  };
  return fields;
}

// A Problem from {field name: value}; missing fields keep their defaults.
Problem parse_problem(const py::dict& values) {
  Problem problem;
  for (const auto& [key, value] : values) {
    const std::string name = key.cast<std::string>();
    const auto field = problem_fields().find(name);
    if (name == "family") {
      problem.family = parse_family(value.cast<std::string>());
    } else if (name == "dtype") {
      problem.dtype = parse_dtype(value.cast<std::string>());
    } else if (field != problem_fields().end()) {
      field->second(problem, name, value);
    } else {
      throw std::invalid_argument("problem: unknown field '" + name + "', see csrc/plan/problem.h");
    }
  }
  return problem;
}

py::dict to_dict(const DeviceFacts& d) {
  return py::dict(py::arg("sm_major") = d.sm_major, py::arg("sm_minor") = d.sm_minor,
                  py::arg("num_sms") = d.num_sms, py::arg("max_smem_bytes") = d.max_smem_bytes,
                  py::arg("l2_bytes") = d.l2_bytes);
}

// A device by name, or {"sm_major": .., "sm_minor": .., "num_sms": .., ...}.
DeviceFacts parse_device(const py::object& device) {
  if (py::isinstance<py::str>(device)) {
    const std::string name = device.cast<std::string>();
    if (const DeviceFacts* facts = find_device(name)) return *facts;
    std::string known;
    for (const NamedDevice& d : named_devices())
      known += (known.empty() ? "" : ", ") + std::string(d.name);
    throw std::invalid_argument("device='" + name + "': expected one of " + known);
  }
  const auto fields = device.cast<std::map<std::string, int64_t>>();
  const auto get = [&](const char* name) {
    const auto found = fields.find(name);
    if (found == fields.end())
      throw std::invalid_argument(std::string("device: field '") + name + "' is missing");
    return found->second;
  };
  return {static_cast<int>(get("sm_major")), static_cast<int>(get("sm_minor")),
          static_cast<int>(get("num_sms")), static_cast<int>(get("max_smem_bytes")),
          get("l2_bytes")};
}

py::dict plan_to_dict(const py::dict& problem, const py::object& device,
                      const std::vector<std::string>& built) {
  ArchSet archs;
  for (const std::string& name : built) archs = archs.with(parse_arch(name));
  const PlanResult result = make_plan(parse_problem(problem), parse_device(device), archs);
  py::dict d(py::arg("ok") = result.ok, py::arg("reasons") = result.reasons);
  if (!result.ok) return d;
  const Plan& plan = result.plan;
  d["kernel"] = instances()[plan.instance].name();
  d["library"] = std::string("_") + arch_name(plan.arch);
  d["arch"] = arch_name(plan.arch);
  d["tiles"] = arch_name(plan.tiles);
  d["tile"] = py::make_tuple(plan.tile_m, plan.tile_n);
  d["num_stages"] = plan.num_stages;
  d["num_threads"] = plan.num_threads;
  d["num_ctas"] = plan.num_ctas;
  d["num_splits"] = plan.num_splits;
  d["vectorized"] = plan.vectorized;
  d["smem_bytes"] = plan.smem_bytes;
  d["head_splits"] = plan.head_splits;
  d["workspace_bytes"] = plan.workspace_bytes;
  return d;
}

py::list kernels() {
  py::list rows;
  for (const Instance& i : instances())
    rows.append(py::dict(py::arg("id") = i.id, py::arg("name") = i.name(),
                         py::arg("arch") = arch_name(i.arch),
                         py::arg("family") = family_name(i.family),
                         py::arg("dtype") = dtype_name(i.dtype), py::arg("head_dim") = i.head_dim));
  return rows;
}

py::dict devices() {
  py::dict d;
  for (const NamedDevice& device : named_devices()) d[device.name] = to_dict(device.facts);
  return d;
}

template <class Enum, class Name>
std::vector<std::string> names(int count, Name name) {
  std::vector<std::string> all;
  for (int i = 0; i < count; ++i) all.push_back(name(static_cast<Enum>(i)));
  return all;
}

py::tuple to_tuple(Range r) {
  return py::make_tuple(r.begin, r.end);
}
py::tuple to_tuple(BlockRange r) {
  return py::make_tuple(r.begin, r.end, r.full_begin, r.full_end);
}
py::tuple to_tuple(RowCol c) {
  return py::make_tuple(c.row, c.col);
}
py::tuple to_tuple(AccumSlot s) {
  return py::make_tuple(s.thread, s.reg);
}
py::tuple to_tuple(TileCoord c) {
  return py::make_tuple(c.m_block, c.head, c.batch);
}

// The mask of a test: (seqlen_q, seqlen_k, window_left, window_right) as a user would give them.
MaskSpec mask_of(const std::array<int, 4>& m) {
  return mask_spec(m[0], m[1], m[2], m[3]);
}

void define_masks(py::module_& m) {
  using Mask = std::array<int, 4>;
  m.def("is_kept", [](const Mask& mask, int q, int k) { return is_kept(mask_of(mask), q, k); });
  m.def("key_range", [](const Mask& mask, int q) { return to_tuple(key_range(mask_of(mask), q)); });
  m.def("query_range",
        [](const Mask& mask, int k) { return to_tuple(query_range(mask_of(mask), k)); });
  m.def("n_block_range", [](const Mask& mask, int m_block, int tile_m, int tile_n) {
    return to_tuple(n_block_range(mask_of(mask), m_block, tile_m, tile_n));
  });
  m.def("m_block_range", [](const Mask& mask, int n_block, int tile_m, int tile_n) {
    return to_tuple(m_block_range(mask_of(mask), n_block, tile_m, tile_n));
  });
}

void define_schedules(py::module_& m) {
  m.def("split_range", [](int begin, int end, int split, int num_splits) {
    return to_tuple(split_range({begin, end}, split, num_splits));
  });
  m.def("choose_num_splits", &choose_num_splits);
  m.def("tile_coord",
        [](int num_m_blocks, int num_heads, int batch_size, int64_t tile, bool longest_first) {
          return to_tuple(tile_coord({num_m_blocks, num_heads, batch_size}, tile, longest_first));
        });
  m.def("varlen_num_tiles", &varlen_num_tiles);
  m.def("varlen_tile_coord",
        [](const std::vector<int>& cu_seqlens, int tile_m, int num_heads, int64_t tile) {
          return to_tuple(varlen_tile_coord(
              cu_seqlens.data(), static_cast<int>(cu_seqlens.size()) - 1, tile_m, num_heads, tile));
        });
  m.def("page_slot", [](const std::vector<int>& page_table_row, int page_size, int token) {
    if (token < 0 || token / page_size >= static_cast<int>(page_table_row.size()))
      throw std::invalid_argument("token: outside the pages of page_table_row");
    const PageSlot slot = page_slot(page_table_row.data(), page_size, token);
    return py::make_tuple(slot.page, slot.offset);
  });
}

void define_layouts(py::module_& m) {
  m.def("swizzle", [](int row_bytes, int row, int byte_in_row) {
    switch (row_bytes) {
      case 128: return swizzle_128b(row, byte_in_row);
      case 64: return swizzle_64b(row, byte_in_row);
      case 32: return swizzle_32b(row, byte_in_row);
      default: throw std::invalid_argument("row_bytes: expected 32, 64 or 128");
    }
  });
  m.def("accum_coord", [](int lane, int reg) { return to_tuple(accum_coord(lane, reg)); });
  m.def("accum_slot", [](int row, int col) { return to_tuple(accum_slot(row, col)); });
  m.def("wgmma_accum_coord",
        [](int thread, int reg) { return to_tuple(wgmma_accum_coord(thread, reg)); });
  m.def("wgmma_accum_slot", [](int row, int col) { return to_tuple(wgmma_accum_slot(row, col)); });
  m.def("rotary_pair", [](int pair, int rotary_dim, bool interleaved) {
    const RotaryPair p = rotary_pair(pair, rotary_dim, interleaved);
    return py::make_tuple(p.first, p.second);
  });
}

void define_philox(py::module_& m) {
  m.def("philox", [](const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
    const Philox4 x =
        philox4x32_7({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
    return py::make_tuple(x.word[0], x.word[1], x.word[2], x.word[3]);
  });
  m.def("dropout_byte", &dropout_byte);
  m.def("keep_threshold", &keep_threshold);
}

void define_tiles(py::module_& m) {
  m.def("built_head_dim", &built_head_dim);
  m.def("max_smem_bytes", [](const std::string& arch) { return max_smem_bytes(parse_arch(arch)); });
  // arch: of the kernels.
  const auto fwd_tile_dict = [](Arch arch, const FwdTileConfig& c, int smem_bytes, int built_v) {
    return py::dict(py::arg("tile_m") = c.tile_m, py::arg("tile_n") = c.tile_n,
                    py::arg("num_stages") = c.num_stages, py::arg("num_q_stages") = c.num_q_stages,
                    py::arg("num_warps") = c.num_warps, py::arg("q_in_regs") = c.q_in_regs,
                    py::arg("warps_per_row") = c.warps_per_row,
                    py::arg("num_threads") = fwd_num_threads(arch, c),
                    py::arg("smem_bytes") = smem_bytes,
                    py::arg("accum_regs") = fwd_accum_regs(c, built_v));
  };
  m.def("sm80_fwd_tile_config", [=](const std::string& gpu, int head_dim) {
    const FwdTileConfig tile = sm80_fwd_tile_config(parse_arch(gpu), head_dim);
    const int built = built_head_dim(head_dim);
    return fwd_tile_dict(Arch::kSm80, tile, fwd_smem_bytes(tile, built, built), built);
  });
  m.def("sm90_fwd_tile_config", [=](int head_dim, int head_dim_v, const std::string& which) {
    const BuiltHeadDims built = sm90_fwd_built_head_dims(head_dim, head_dim_v);
    const FwdTileConfig tile =
        sm90_fwd_tile_config(built, which == "long"   ? Sm90FwdTile::kLong
                                    : which == "fine" ? Sm90FwdTile::kFine
                                                      : Sm90FwdTile::kScoreMod);
    return fwd_tile_dict(Arch::kSm90, tile, sm90_fwd_smem_bytes(tile, built), built.head_dim_v);
  });
  const auto bwd_tile_dict = [](Arch arch, const BwdTileConfig& c, int head_dim) {
    const int built = built_head_dim(head_dim);
    return py::dict(
        py::arg("tile_m") = c.tile_m, py::arg("tile_n") = c.tile_n,
        py::arg("num_q_stages") = c.num_q_stages, py::arg("num_dout_stages") = c.num_dout_stages,
        py::arg("num_ds_stages") = c.num_ds_stages, py::arg("num_warps") = c.num_warps,
        py::arg("v_in_regs") = c.v_in_regs, py::arg("dq_through_smem") = c.dq_through_smem,
        py::arg("num_ctas") = c.num_ctas, py::arg("num_threads") = bwd_num_threads(arch, c),
        py::arg("smem_bytes") = bwd_smem_bytes(c, built),
        py::arg("accum_regs") = bwd_accum_regs(c, built));
  };
  m.def("bwd_tile_config", [=](const std::string& arch_text, int head_dim) {
    const Arch arch = parse_arch(arch_text);
    return bwd_tile_dict(arch, bwd_tile_config(arch, head_dim), head_dim);
  });
  m.def("sm80_bwd_tile_config", [=](const std::string& gpu, int head_dim) {
    return bwd_tile_dict(Arch::kSm80, sm80_bwd_tile_config(parse_arch(gpu), head_dim), head_dim);
  });
}

}  // namespace
}  // namespace fa

PYBIND11_MODULE(_introspect, m) {
  m.doc() = "Plans, kernels and integer rules of flash_attn_ext; needs no GPU and no torch.";
  m.def("make_plan", &fa::plan_to_dict, py::arg("problem"), py::arg("device"), py::arg("built"),
        "Plan of `problem` (fields of csrc/plan/problem.h) on a named device or a dict of facts.");
  m.def("devices", &fa::devices, "Named devices and their facts.");
  m.def("kernels", &fa::kernels, "All compiled kernels: the rows of csrc/plan/instances.def.");
  m.def("families", [] { return fa::names<fa::Family>(fa::kNumFamilies, fa::family_name); });
  m.def("archs", [] { return fa::names<fa::Arch>(fa::kNumArchs, fa::arch_name); });
  m.def("dtypes", [] { return fa::names<fa::DType>(fa::kNumDTypes, fa::dtype_name); });
  fa::define_masks(m);
  fa::define_schedules(m);
  fa::define_layouts(m);
  fa::define_philox(m);
  fa::define_tiles(m);
}

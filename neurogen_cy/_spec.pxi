# From the Python configuration to the native description of a model.

from neurogen_cy._neurogen cimport ModelSpec, ProjectionSpec, RegionSpec, int32_t, uint64_t


cdef ModelSpec make_spec(object cfg, dict topology, int streams, int max_tokens, int threads, uint64_t seed, int device,
                         str precision, str sync) except *:
    """The native description of a Config; `topology` maps projection keys to their block columns (int32)."""
    cdef ModelSpec spec
    cdef RegionSpec region_spec
    cdef ProjectionSpec projection_spec
    cdef const int32_t[::1] cols
    spec.vocab, spec.dim = cfg.vocab_size, cfg.dim
    spec.graded, spec.tied = cfg.graded, cfg.tie_decoder
    spec.surrogate_k, spec.dropout = cfg.surrogate_k, cfg.dropout
    spec.max_spike = float("inf") if cfg.max_spike is None else cfg.max_spike
    spec.rate_target, spec.rate_weight = cfg.rate_target, cfg.rate_weight
    spec.streams, spec.max_tokens, spec.threads, spec.seed = streams, max_tokens, threads, seed
    spec.device, spec.spin = device, sync == "spin"
    spec.bf16, spec.fp8 = precision in ("bf16", "fp8"), precision == "fp8"
    index = {"embedding": -1, "broca_out": len(cfg.regions)}
    for number, region in enumerate(cfg.regions):
        index[region.name] = number
        region_spec.name = region.name.encode()
        region_spec.neurons, region_spec.level = region.neurons, region.level
        spec.regions.push_back(region_spec)
    for projection in cfg.projections:
        key = cfg.key(projection)
        projection_spec.key = key.encode()
        projection_spec.src, projection_spec.dst = index[projection.src], index[projection.dst]
        projection_spec.delay, projection_spec.gate = projection.delay, projection.kind == "gate"
        projection_spec.blocks_per_row = cfg.blocks_per_row(projection)
        projection_spec.cols.clear()
        if key in topology:
            cols = topology[key]
            projection_spec.cols.assign(&cols[0], &cols[0] + cols.shape[0])
        spec.projections.push_back(projection_spec)
    return spec


def memory_plan(cfg, int streams, int max_tokens, int threads, str precision):
    """Bytes by part that a model of this configuration allocates, before anything is allocated."""
    plan = memory_plan_of(make_spec(cfg, {}, streams, max_tokens, threads, 0, 0, precision, "block"))
    return {part.first.decode(): part.second for part in plan}

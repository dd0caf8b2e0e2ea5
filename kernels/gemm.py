"""The Triton kernel of the scatter-GEMM: a dense product whose tiles are stored at the rows that an index names.

    address    where an entry of a strided grid is
    product    the main loop of one tile, as of any GEMM
    finish     bias, norm and rotary embedding of the tile, then the splice

`scatter_linear_kernel` runs one such product; `splice_kernel` only finishes what cuBLAS has computed; `grouped.py` runs several
products in one launch, made of the same parts. Names in the kernels: i_ an index, o_ offsets, m_ masks, p_ pointers, b_ blocks
of values, s_ strides.
"""

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the ops run their eager twins
    triton = tl = None

INTERPRETED = False

if triton is not None:

    @triton.jit
    def address(o_i, SIZE0, SIZE1, s_0, s_1, s_2):
        """Where entries of a grid of three dims are that are numbered from the innermost dim on; fewer than 2**31 entries."""
        o_i = o_i.to(tl.int32)  # a division of 64 bits is a call, around which a whole tile would be spilled
        o_x = (o_i % SIZE0).to(tl.int64) * s_0 + (o_i // SIZE0 % SIZE1).to(tl.int64) * s_1
        return o_x + (o_i // (SIZE0 * SIZE1)).to(tl.int64) * s_2

    @triton.jit
    def place(i_p, M, N, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr):
        """Row and column of tile number i_p, numbered in groups of GROUP tile rows: neighbours in time share operands in L2."""
        T_M = tl.cdiv(M, BM)
        if D > 0:
            T_N = tl.cdiv(N // D, BN // DP)
        else:
            T_N = tl.cdiv(N, BN)
        i_g = i_p // (GROUP * T_N)
        G = tl.minimum(T_M - i_g * GROUP, GROUP)
        i_m = i_g * GROUP + (i_p % (GROUP * T_N)) % G
        i_n = (i_p % (GROUP * T_N)) // G
        return i_m, i_n

    @triton.jit
    def columns(i_n, N, BN: tl.constexpr, ROPE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
        """The output channels of a tile, [BN], and which of them there are."""
        o_j = tl.arange(0, BN)  # [BN]
        if D > 0 and D != DP:
            # Heads are padded to powers of two (each half of one, where halves are paired).
            if ROPE == 2:
                o_d = (o_j % DP) // (DP // 2) * (D // 2) + o_j % (DP // 2)
                m_d = o_j % (DP // 2) < D // 2
            else:
                o_d = o_j % DP
                m_d = o_d < D
            o_h = i_n * (BN // DP) + o_j // DP
            o_n = o_h * D + o_d  # [BN]
            m_n = m_d & (o_n < N)
        else:
            o_n = i_n * BN + o_j  # [BN]
            m_n = o_n < N
        return o_n, m_n

    @triton.jit
    def product(
        i_m, i_n, o_b, o_a, o_n,
        x, weight, N, K, s_xb, s_xa, s_xk, s_wn, s_wk,
        EVEN_K: tl.constexpr, WIDEN: tl.constexpr, TMA: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ):  # fmt: skip
        """`x @ weight.T` for the tile, in fp32: [BM, BN]. With TMA, x and weight are tensor descriptors."""
        b_y = tl.zeros([BM, BN], dtype=tl.float32)
        if TMA:
            for i_k in range(0, tl.cdiv(K, BK)):
                b_x = x.load([i_m * BM, i_k * BK])  # [BM, BK], zeros past the end
                b_w = weight.load([i_n * BN, i_k * BK])  # [BN, BK]
                b_y = tl.dot(b_x, b_w.T, b_y)
        else:
            o_k = tl.arange(0, BK)  # [BK]
            o_nc = tl.minimum(o_n, N - 1)
            p_x = x + (o_b * s_xb + o_a * s_xa)[:, None] + o_k[None, :] * s_xk  # [BM, BK]
            p_w = weight + o_k[:, None] * s_wk + o_nc.to(tl.int64)[None, :] * s_wn  # [BK, BN]
            for i_k in range(0, tl.cdiv(K, BK)):
                if EVEN_K:
                    b_x = tl.load(p_x)  # [BM, BK]
                    b_w = tl.load(p_w)  # [BK, BN]
                else:
                    m_k = o_k < K - i_k * BK  # [BK]
                    b_x = tl.load(p_x, mask=m_k[None, :], other=0.0)
                    b_w = tl.load(p_w, mask=m_k[:, None], other=0.0)
                if WIDEN:
                    b_x, b_w = b_x.to(tl.float32), b_w.to(tl.float32)
                # "ieee" matters for fp32 only: TF32, the default, keeps 10 bits of mantissa and misses 1e-4.
                b_y = tl.dot(b_x, b_w, b_y, input_precision="ieee")
                p_x += BK * s_xk
                p_w += BK * s_wk
        return b_y

    @triton.jit
    def _load_pair(
        table, o_b, o_a, o_p, m_p, s_tb, s_ta, s_tk, ROPE: tl.constexpr, FULL: tl.constexpr, D: tl.constexpr
    ):
        """A rotary table for the first and the second entries of each pair: twice [BM, 1, DP / 2]."""
        p_t = table + (o_b * s_tb + o_a * s_ta)[:, None, None]  # [BM, 1, 1]
        if FULL and ROPE == 1:  # neighbours, in loads that are wide: one for every other entry takes four times as many
            o_t = tl.arange(0, 2 * o_p.shape[0])  # [DP]
            b_t = tl.load(p_t + (o_t * s_tk)[None, None, :], mask=(o_t < D)[None, None, :], other=0.0).to(tl.float32)
            return tl.split(tl.reshape(b_t, [o_b.shape[0], 1, o_p.shape[0], 2]))
        b_first = tl.load(p_t + (o_p * s_tk)[None, None, :], mask=m_p[None, None, :], other=0.0).to(tl.float32)
        if not FULL:  # an entry per pair
            return b_first, b_first
        p_t += D // 2 * s_tk
        b_second = tl.load(p_t + (o_p * s_tk)[None, None, :], mask=m_p[None, None, :], other=0.0).to(tl.float32)
        return b_first, b_second

    @triton.jit
    def finish(
        b_y, o_m, o_b, o_a, o_n, m_n,
        cache, bias, rows, norm_weight, norm_bias, cos, sin,
        M, N, S, G0, G1, C0, C1, eps,
        s_cb, s_g0, s_g1, s_g2, s_c0, s_c1, s_c2,
        s_bn, s_rb, s_ra, s_nw, s_nb, s_cosb, s_cosa, s_cosk, s_sinb, s_sina, s_sink,
        HAS_BIAS: tl.constexpr, NORM: tl.constexpr, NORM_WEIGHT: tl.constexpr, NORM_BIAS: tl.constexpr,
        ROPE: tl.constexpr, FULL_COS: tl.constexpr, FULL_SIN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr,
    ):  # fmt: skip
        """Bias, norm and rotary embedding of a tile b_y [BM, BN]; then each row is stored where it belongs."""
        if HAS_BIAS:
            b_y += tl.load(bias + o_n * s_bn, mask=m_n, other=0.0).to(tl.float32)[None, :]

        if NORM > 0:  # 1: rms, 2: layer
            b_y = tl.where(m_n[None, :], b_y, 0.0)
            b_z = tl.reshape(b_y, [BM, BN // DP, DP])
            if NORM == 2:
                b_z -= (tl.sum(b_z, 2) / D)[:, :, None]
                b_z = tl.reshape(tl.where(m_n[None, :], tl.reshape(b_z, [BM, BN]), 0.0), [BM, BN // DP, DP])
            b_z *= (1.0 / tl.sqrt(tl.sum(b_z * b_z, 2) / D + eps))[:, :, None]
            b_y = tl.reshape(b_z, [BM, BN])
            if NORM_WEIGHT:
                b_y *= tl.load(norm_weight + o_n % D * s_nw, mask=m_n, other=0.0).to(tl.float32)[None, :]
            if NORM_BIAS:
                b_y += tl.load(norm_bias + o_n % D * s_nb, mask=m_n, other=0.0).to(tl.float32)[None, :]

        if ROPE > 0:  # 1: interleaved pairs, 2: pairs of halves
            o_p = tl.arange(0, DP // 2)  # [DP / 2]
            m_p = o_p < D // 2
            if ROPE == 1:
                b_z = tl.reshape(b_y, [BM, BN // DP, DP // 2, 2])
            else:
                b_z = tl.permute(tl.reshape(b_y, [BM, BN // DP, 2, DP // 2]), [0, 1, 3, 2])
            b_first, b_second = tl.split(b_z)  # [BM, BN / DP, DP / 2]
            b_c, b_c2 = _load_pair(cos, o_b, o_a, o_p, m_p, s_cosb, s_cosa, s_cosk, ROPE, FULL_COS, D)
            b_s, b_s2 = _load_pair(sin, o_b, o_a, o_p, m_p, s_sinb, s_sina, s_sink, ROPE, FULL_SIN, D)
            b_z = tl.join(b_first * b_c - b_second * b_s, b_second * b_c2 + b_first * b_s2)
            if ROPE == 2:
                b_z = tl.permute(b_z, [0, 1, 3, 2])
            b_y = tl.reshape(b_z, [BM, BN])

        # The splice: row i of sample b belongs at cache[b, rows[b, i]]. A row outside the cache is not written, so
        # that a wrong index cannot reach another tensor's memory.
        b_row = tl.load(rows + o_b * s_rb + o_a * s_ra)  # [BM]
        m_m = (o_m < M) & (b_row >= 0) & (b_row < S)
        o_cm = o_b * s_cb + address(b_row, G0, G1, s_g0, s_g1, s_g2)  # [BM]
        o_cn = address(o_n, C0, C1, s_c0, s_c1, s_c2)  # [BN]
        tl.store(
            cache + o_cm[:, None] + o_cn[None, :], b_y.to(cache.dtype.element_ty), mask=m_m[:, None] & m_n[None, :]
        )

    @triton.jit
    def _write_tile(
        i_p,
        cache, x, weight, bias, rows, norm_weight, norm_bias, cos, sin,
        M, N, K, A, S, G0, G1, C0, C1, eps,
        s_cb, s_g0, s_g1, s_g2, s_c0, s_c1, s_c2,
        s_xb, s_xa, s_xk, s_wn, s_wk, s_bn, s_rb, s_ra, s_nw, s_nb,
        s_cosb, s_cosa, s_cosk, s_sinb, s_sina, s_sink,
        HAS_BIAS: tl.constexpr, NORM: tl.constexpr, NORM_WEIGHT: tl.constexpr, NORM_BIAS: tl.constexpr,
        ROPE: tl.constexpr, FULL_COS: tl.constexpr, FULL_SIN: tl.constexpr,
        D: tl.constexpr, DP: tl.constexpr,
        EVEN_K: tl.constexpr, WIDEN: tl.constexpr, TMA: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """Tile number i_p."""
        i_m, i_n = place(i_p, M, N, BM, BN, D, DP, GROUP)
        o_m = i_m * BM + tl.arange(0, BM)  # [BM]
        o_n, m_n = columns(i_n, N, BN, ROPE, D, DP)
        # Rows and columns past the end repeat another one instead of being masked, so that the loop has no mask on
        # them; the epilogue does not store them. Offsets of rows are int64: a video's cache passes 2**31 elements.
        o_mc = tl.minimum(o_m, M - 1)
        o_b = (o_mc // A).to(tl.int64)  # [BM]
        o_a = (o_mc % A).to(tl.int64)  # [BM]
        b_y = product(
            i_m, i_n, o_b, o_a, o_n, x, weight, N, K, s_xb, s_xa, s_xk, s_wn, s_wk, EVEN_K, WIDEN, TMA, BM, BN, BK
        )
        finish(
            b_y, o_m, o_b, o_a, o_n, m_n, cache, bias, rows, norm_weight, norm_bias, cos, sin,
            M, N, S, G0, G1, C0, C1, eps, s_cb, s_g0, s_g1, s_g2, s_c0, s_c1, s_c2,
            s_bn, s_rb, s_ra, s_nw, s_nb, s_cosb, s_cosa, s_cosk, s_sinb, s_sina, s_sink,
            HAS_BIAS, NORM, NORM_WEIGHT, NORM_BIAS, ROPE, FULL_COS, FULL_SIN, D, DP, BM, BN,
        )  # fmt: skip

    @triton.jit
    def scatter_linear_kernel(
        cache, x, weight, bias, rows, norm_weight, norm_bias, cos, sin,
        M, N, K,  # rows of the GEMM (B * A), output channels, input channels
        A, S,  # active rows per sample, rows of the cache per sample
        G0, G1,  # sizes of the last two dims of the cache's grid, innermost first
        C0, C1,  # sizes of the last two dims of its channels, innermost first
        eps,
        s_cb, s_g0, s_g1, s_g2, s_c0, s_c1, s_c2,  # strides of cache [B, *grid, *channels]
        s_xb, s_xa, s_xk, s_wn, s_wk, s_bn, s_rb, s_ra, s_nw, s_nb,
        s_cosb, s_cosa, s_cosk, s_sinb, s_sina, s_sink,
        T,  # number of tiles
        HAS_BIAS: tl.constexpr, NORM: tl.constexpr, NORM_WEIGHT: tl.constexpr, NORM_BIAS: tl.constexpr,
        ROPE: tl.constexpr, FULL_COS: tl.constexpr, FULL_SIN: tl.constexpr,
        D: tl.constexpr, DP: tl.constexpr,  # channels of a head, 0 where heads do not matter; padded to a power of two
        EVEN_K: tl.constexpr, WIDEN: tl.constexpr, TMA: tl.constexpr, PERSISTENT: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """One tile of the product per program, or all of them in turns (PERSISTENT)."""
        if PERSISTENT:
            for i_p in tl.range(tl.program_id(0), T, tl.num_programs(0), flatten=True):
                _write_tile(
                    i_p, cache, x, weight, bias, rows, norm_weight, norm_bias, cos, sin,
                    M, N, K, A, S, G0, G1, C0, C1, eps, s_cb, s_g0, s_g1, s_g2, s_c0, s_c1, s_c2,
                    s_xb, s_xa, s_xk, s_wn, s_wk, s_bn, s_rb, s_ra, s_nw, s_nb,
                    s_cosb, s_cosa, s_cosk, s_sinb, s_sina, s_sink,
                    HAS_BIAS, NORM, NORM_WEIGHT, NORM_BIAS, ROPE, FULL_COS, FULL_SIN, D, DP, EVEN_K, WIDEN, TMA,
                    BM, BN, BK, GROUP,
                )  # fmt: skip
        else:
            _write_tile(
                tl.program_id(0), cache, x, weight, bias, rows, norm_weight, norm_bias, cos, sin,
                M, N, K, A, S, G0, G1, C0, C1, eps, s_cb, s_g0, s_g1, s_g2, s_c0, s_c1, s_c2,
                s_xb, s_xa, s_xk, s_wn, s_wk, s_bn, s_rb, s_ra, s_nw, s_nb,
                s_cosb, s_cosa, s_cosk, s_sinb, s_sina, s_sink,
                HAS_BIAS, NORM, NORM_WEIGHT, NORM_BIAS, ROPE, FULL_COS, FULL_SIN, D, DP, EVEN_K, WIDEN, TMA,
                BM, BN, BK, GROUP,
            )  # fmt: skip

    @triton.jit
    def splice_kernel(
        cache, y, rows, norm_weight, norm_bias, cos, sin,
        M, N, A, S, G0, G1, C0, C1, eps,  # as for `scatter_linear_kernel`
        s_cb, s_g0, s_g1, s_g2, s_c0, s_c1, s_c2, s_rb, s_ra, s_nw, s_nb, s_cosb, s_cosa, s_cosk, s_sinb, s_sina, s_sink,
        NORM: tl.constexpr, NORM_WEIGHT: tl.constexpr, NORM_BIAS: tl.constexpr,
        ROPE: tl.constexpr, FULL_COS: tl.constexpr, FULL_SIN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr,
    ):  # fmt: skip
        """Norm, rotary embedding and splice of one tile of y [M, N], a product that lies in memory row by row."""
        i_m, i_n = place(tl.program_id(0), M, N, BM, BN, D, DP, 1)
        o_m = i_m * BM + tl.arange(0, BM)  # [BM]
        o_n, m_n = columns(i_n, N, BN, ROPE, D, DP)
        o_mc = tl.minimum(o_m, M - 1)
        p_y = y + o_mc.to(tl.int64)[:, None] * N + o_n[None, :]  # [BM, BN]
        b_y = tl.load(p_y, mask=m_n[None, :], other=0.0).to(tl.float32)
        finish(
            b_y, o_m, (o_mc // A).to(tl.int64), (o_mc % A).to(tl.int64), o_n, m_n,
            cache, y, rows, norm_weight, norm_bias, cos, sin,
            M, N, S, G0, G1, C0, C1, eps, s_cb, s_g0, s_g1, s_g2, s_c0, s_c1, s_c2,
            0, s_rb, s_ra, s_nw, s_nb, s_cosb, s_cosa, s_cosk, s_sinb, s_sina, s_sink,
            False, NORM, NORM_WEIGHT, NORM_BIAS, ROPE, FULL_COS, FULL_SIN, D, DP, BM, BN,
        )  # fmt: skip

    # With TRITON_INTERPRET=1 at import, `triton.jit` makes another class, which runs on the CPU.
    INTERPRETED = not isinstance(scatter_linear_kernel, triton.JITFunction)

# fmt: off
# ruff: noqa: E501  (tables of one-line operations)
"""The cases of ``claims`` that compute: reductions, scans, products, layers, transforms, algebra, losses, recurrences."""

import torch
from tests.ghost.claim_cases import D2, case, dims
from torch.nn import functional as F

# -- reductions -------------------------------------------------------------------------------------------------------

for name in "sum mean nansum nanmean prod amax amin max min var std norm logsumexp all any argmax argmin median".split():
    case(
        name, "abc/b" if name in ("all", "any") else "abc",
        *dims(lambda x, d, f=name: getattr(x, f)(dim=d), of=(0, 1, -1)), *dims(lambda x, d, f=name: getattr(torch, f)(x, dim=d, keepdim=True), of=(1, -1)),
    )  # fmt: skip
for name in "sum mean prod amax max min all any argmax argmin median var std logsumexp nansum nanmean".split():
    case(name, "abc/b" if name in ("all", "any") else "abc", *dims(lambda x, d, f=name: getattr(x, f)(d), of=(0, 2)), lambda x, f=name: getattr(x, f)(-2, keepdim=True))
for name in "sum mean nansum amax amin var std logsumexp nanmean".split():
    case(name, "abc", lambda x, f=name: getattr(x, f)((0, 2)), lambda x, f=name: getattr(x, f)(dim=[-1, 1], keepdim=True), lambda x, f=name: getattr(x, f)((1,)))
case(
    "sum",
    "abc",
    lambda x: x.sum(),
    lambda x: torch.sum(x),
    lambda x: x.sum(dtype=torch.float64),
    lambda x: x.sum(None),
    lambda x: x.sum(()),
    lambda x: x.sum(axis=1),
    lambda x: (x > 0).sum(),
    lambda x: x.sum((0, 1)) * 3 - 1,
    lambda x: -x.mean() / 2,
    lambda x: x.mean(),
    lambda x: x.nansum(),
    lambda x: (x > 0).long().sum(),
    lambda x: torch.stack([x.sum(), x.mean()]),
    lambda x: x.mean(0).to(torch.float64).view(-1).sum() * 2,
    wary=[
        lambda x: x.mean().exp(),
        lambda x: x.sum() * x.mean(),
        lambda x: 1 / x.sum(),
        lambda x: x.sum() / x.abs().sum(),
        lambda x: x.mean(0) ** 2,
        lambda x: x.sum() - x,
        lambda x: (x.sum(0) + 1) * x.sum(0),
        lambda x: (x > 0).sum().bool(),
        lambda x: (x > 0).sum() > 0,
        lambda x: (x > 0).sum() == x.numel(),
        lambda x: torch.cat([x.sum(0), x.sum(0) * 2]),
        lambda x: x.sum(0)[0],
        lambda x: x.sum(0).float().round(),
        lambda x: x.mean(0).sub(x.sum(0), alpha=2),
        lambda x: x.mean(0).to(torch.int64),
        lambda x: x.sum() // 2,
        lambda x: x.mean(0).mul(x.mean(0)),
        lambda x: x.mean(0).clone().mul_(2.0),
        lambda x: torch.sub(1.0, x.sum()),
        lambda x: x.mean(0).div(2.0, rounding_mode="floor"),
        lambda x: 2.0 / x.mean(),
        lambda x: x.sum(0).norm(),
        lambda x: x.mean(0).copy_(x.sum(0)),
    ],
)
case("all", "abc", lambda x: (x > -1.8).all(), lambda x: (x > 1.8).any(), lambda x: torch.all(x > -1.8) | torch.any(x > 9), lambda x: ~(x > -1.8).all(), wary=[lambda x: (x > 0).all().float(), lambda x: (x > 0).any() & (x[0] > 0).any()])
case("prod", "abc", *dims(lambda x, d: x.prod(d)), wary=[lambda x: x.prod(), lambda x: x.max(), lambda x: x.argmax(), lambda x: x.var(), lambda x: x.norm(), lambda x: x.median(), lambda x: x.amax(), lambda x: x.std()])
case("norm", "abc", *dims(lambda x, d: x.norm(2, d), lambda x, d: torch.norm(x, 2, d, True), of=D2), lambda x: x.norm(1, -1), lambda x: x.norm(p=2, dim=(1, 2)), lambda x: x.norm(dim=0, keepdim=True))
case("linalg_vector_norm", "abc", *dims(lambda x, d: torch.linalg.vector_norm(x, 2, d), lambda x, d: torch.linalg.vector_norm(x, dim=d, keepdim=True), of=D2), lambda x: torch.linalg.vector_norm(x, 1, (0, 2)), wary=[lambda x: torch.linalg.vector_norm(x)])
case("linalg_norm", "abc", *dims(lambda x, d: torch.linalg.norm(x, dim=d), lambda x, d: torch.linalg.norm(x, 2, d, True), of=D2), lambda x: torch.linalg.norm(x, dim=(0, 2)), wary=[lambda x: torch.linalg.norm(x)])
case("count_nonzero", "abc", *dims(lambda x, d: (x > 0).count_nonzero(d)), lambda x: torch.count_nonzero(x > 0, dim=(0, 1)), wary=[lambda x: (x > 0).count_nonzero()])
for name in ("var_mean", "std_mean"):
    case(name, "abc", *dims(lambda x, d, f=name: getattr(torch, f)(x, d), of=D2), lambda x, f=name: getattr(torch, f)(x, dim=(0, 2), keepdim=True), lambda x, f=name: getattr(torch, f)(x, -1, False), wary=[lambda x, f=name: getattr(torch, f)(x)])
case("var", "abc", lambda x: x.var(-1, False), lambda x: x.var(dim=1, correction=0), lambda x: torch.std(x, 0, unbiased=False), lambda x: x.var([1], keepdim=True), wary=[lambda x: x.var(False)])
case("max", "abc abc", lambda x, y: torch.max(x, y), lambda x, y: x.max(y), wary=[lambda x, y: torch.max(x, other=y), lambda x, y: torch.min(x, y[:1]), lambda x, y: torch.max(x, y.flip(0))])

# -- along one dim ----------------------------------------------------------------------------------------------------

for name in "softmax log_softmax cumsum cumprod logcumsumexp cummax cummin argsort sort flip".split():
    case(name, "abc", *dims(lambda x, d, f=name: getattr(x, f)(d)) if name not in ("sort", "argsort", "flip") else dims(lambda x, d, f=name: getattr(x, f)(d), of=D2), *(dims(lambda x, d, f=name: getattr(torch, f)(x, dim=d), of=D2) if name != "flip" else []))
case("softmin", "abc", *dims(lambda x, d: F.softmin(x, dim=d), lambda x, d: F.softmin(x, d), of=D2))
case("softmax", "abc", *dims(lambda x, d: F.softmax(x, d), of=D2), lambda x: F.softmax(input=x, dim=-1), lambda x: torch.softmax(x, dim=1, dtype=torch.float64))
case("sort", "abc", lambda x: x.sort(), lambda x: torch.sort(x, descending=True), lambda x: torch.sort(x, stable=True, dim=0), lambda x: x.sort(1, True), lambda x: x.argsort(), lambda x: x.argsort(-2, True), lambda x: torch.argsort(x, stable=True, dim=1))
case("topk", "abc", lambda x: x.topk(2), *dims(lambda x, d: x.topk(2, d), lambda x, d: torch.topk(x, k=1, dim=d), of=D2), lambda x: x.topk(2, largest=False))
case("flip", "abc", lambda x: x.flip(0, 1), lambda x: x.flip((1, 2)), lambda x: torch.flip(x, [0]), lambda x: torch.flip(x, dims=(-1, 0)))
case("roll", "abc", *dims(lambda x, d: x.roll(1, d), lambda x, d: torch.roll(x, shifts=1, dims=d), of=D2), lambda x: torch.roll(x, (1, 1), (0, 1)), lambda x: x.roll((1, 2), dims=(1, 2)), wary=[lambda x: x.roll(1)])
case("normalize", "abc", lambda x: F.normalize(x), *dims(lambda x, d: F.normalize(x, dim=d), lambda x, d: F.normalize(x, 1.0, d), of=D2))
case("glu", "abc", lambda x: F.glu(x), *dims(lambda x, d: F.glu(x, d), lambda x, d: F.glu(x, dim=d), of=D2))
case("renorm", "abc", *dims(lambda x, d: x.renorm(2, d, 0.5), lambda x, d: torch.renorm(x, p=2, dim=d, maxnorm=0.5), of=D2))
case(
    "cosine_similarity",
    "abc abc",
    *dims(lambda x, y, d: F.cosine_similarity(x, y, dim=d), lambda x, y, d: F.cosine_similarity(x, y, d), of=D2),
    lambda x, y: F.cosine_similarity(x, y),
    wary=[lambda x, y: F.cosine_similarity(x[:, None], y[None], dim=-1), lambda x, y: F.cosine_similarity(x[0], y, dim=-1), lambda x, y: F.cosine_similarity(x1=x, x2=y, dim=-1)],
)
case("diff", "abc", *dims(lambda x, d: x.diff(1, d), lambda x, d: torch.diff(x, n=2, dim=d), of=D2), lambda x: x.diff(), lambda x: x.diff(dim=1, prepend=x[:, :1], append=x[:, -1:]))
case("diff", "abc ab1", lambda x, y: x.diff(prepend=y), lambda x, y: torch.diff(x, 1, -1, y, y))
case("diff", "abc 1bc/c", lambda x, y: x.diff(dim=0, prepend=y), wary=[lambda x, y: x.diff(dim=0, prepend=x[:1])])
for name in ("kthvalue",):
    case(name, "abc", *dims(lambda x, d: x.kthvalue(2, d), lambda x, d: torch.kthvalue(x, k=1, dim=d, keepdim=True), of=D2), lambda x: x.kthvalue(2))
case("mode", "abc/i", lambda x: x.mode(), *dims(lambda x, d: x.mode(d), lambda x, d: torch.mode(x, dim=d, keepdim=True), of=D2))
case("median", "abc", lambda x: torch.median(x, 1), wary=[lambda x: torch.median(x), lambda x: x.nanmedian(1)])
for name in ("quantile", "nanquantile"):
    case(
        name,
        "abc",
        *dims(lambda x, d, f=name: getattr(torch, f)(x, 0.3, d), lambda x, d, f=name: getattr(x, f)(0.3, dim=d, keepdim=True), of=D2),
        wary=[lambda x, f=name: getattr(torch, f)(x, 0.3), lambda x, f=name: getattr(torch, f)(x, torch.tensor([0.1, 0.2, 0.3, 0.4]).double(), dim=1), lambda x, f=name: getattr(torch, f)(x, torch.tensor(0.3).double(), dim=-1)],
    )
for name in ("trapezoid", "trapz", "cumulative_trapezoid"):
    case(name, "abc", *dims(lambda x, d, f=name: getattr(torch, f)(x, dim=d), of=D2), lambda x, f=name: getattr(torch, f)(x), lambda x, f=name: getattr(torch, f)(x, dx=2.0, dim=1), wary=[lambda x, f=name: getattr(torch, f)(x, x), lambda x, f=name: getattr(torch, f)(x, torch.arange(x.shape[-1]))])
case("msort", "abc", lambda x: torch.msort(x), lambda x: x.msort())
case("cross", "ab3 ab3", lambda x, y: torch.cross(x, y, dim=-1), lambda x, y: torch.cross(x, y, 2))
case("linalg_cross", "ab3 ab3,1b3 ab3", lambda x, y: torch.linalg.cross(x, y), lambda x, y: torch.linalg.cross(x, y, dim=-1))
case("linalg_vecdot", "abc abc,bc abc,ab1 abc", lambda x, y: torch.linalg.vecdot(x, y), lambda x, y: torch.linalg.vecdot(x, y, dim=-1), *[lambda x, y: torch.linalg.vecdot(x, y, dim=1 - max(x.dim(), y.dim()) + 1)])
case("searchsorted", "abc abc", lambda x, y: torch.searchsorted(x.sort(-1).values, y), wary=[lambda x, y: torch.searchsorted(x[0, 0].sort().values, y), lambda x, y: torch.searchsorted(x.flatten().sort().values, y.contiguous(), right=True), lambda x, y: torch.searchsorted(x, y, sorter=x.argsort(-1))])
case("searchsorted", "a/c bc", lambda x, y: torch.searchsorted(x.sort()[0], y))
case("bucketize", "ab c", lambda x, y: torch.bucketize(x, y.sort()[0]), lambda x, y: torch.bucketize(x, torch.linspace(-1, 1, 3).double(), right=True))

# -- products ---------------------------------------------------------------------------------------------------------

case(
    "matmul",
    "abc acd,abc cd,bc acd,abcd ade,abc c,a abc,ab bc,ab b,b bc,abcd bade",
    lambda x, y: x @ y if x.shape[-1] == y.shape[max(-2, -y.dim())] else torch.matmul(x, y.transpose(0, 1)),
    lambda x, y: torch.matmul(input=x, other=y) if False else torch.matmul(x, other=y) if x.shape[-1] == y.shape[max(-2, -y.dim())] else x.matmul(y.transpose(0, 1)),
    b=4,
    a=4,
)
case("rmatmul", "abc acd", lambda x, y: y.__rmatmul__(x))
case("bmm", "abc acd", lambda x, y: torch.bmm(x, y), lambda x, y: x.bmm(mat2=y))
case("mm", "ab bc", lambda x, y: torch.mm(x, y), lambda x, y: x.mm(mat2=y))
case("mv", "ab b", lambda x, y: torch.mv(x, y), wary=[lambda x, y: x.mv(vec=y)])
case("addmm", "ab ac cb,b ac cb", lambda z, x, y: torch.addmm(z, x, y), lambda z, x, y: z.addmm(x, y, beta=2) if z.dim() == 2 else torch.addmm(z, x, y, alpha=3), lambda z, x, y: torch.addmm(z, mat1=x, mat2=y), lambda z, x, y: torch.addmm(input=z, mat1=x, mat2=y))
case("baddbmm", "abd abc acd", lambda z, x, y: torch.baddbmm(z, x, y), lambda z, x, y: z.baddbmm(batch1=x, batch2=y))
case("addmv", "a ab b", lambda z, x, y: torch.addmv(z, x, y), lambda z, x, y: z.addmv(x, y), wary=[lambda z, x, y: torch.addmv(z, mat=x, vec=y)])
case("linear", "abc dc/c,abc dc", lambda x, w: F.linear(x, w), lambda x, w: F.linear(x, weight=w), lambda x, w: F.linear(x, w, torch.ones(w.shape[0]).double()))
case("linear", "ab cb/c c", lambda x, w, v: F.linear(x, w, v), wary=[lambda x, w, v: F.linear(x, w, bias=v), lambda x, w, v: F.linear(input=x, weight=w)])
case(
    "einsum",
    "abc acd",
    lambda x, y: torch.einsum("abc,acd->abd", x, y),
    lambda x, y: torch.einsum("abc,acd->dba", x, y),
    lambda x, y: torch.einsum("abc,acd", x, y),
    lambda x, y: torch.einsum("...c,acd->...ad", x, y),
    lambda x, y: torch.einsum("abc, acd -> b d", [x, y]),
    lambda x, y: torch.einsum("a...,a...->...a", x[..., 0], y[..., 0]) if x.shape[1] == y.shape[1] else torch.einsum("abc,acd->a", x, y),
    lambda x, y: torch.einsum("abc,acd->", x, y),
    lambda x, y: torch.einsum("...bc,...cd->...bd", x, y),
    wary=[lambda x, y: torch.einsum(x, [0, 1, 2], y, [0, 2, 3], [0, 3])],
)
case(
    "einsum",
    "abc",
    lambda x: torch.einsum("ijk->kij", x),
    lambda x: torch.einsum("...i,...i", x, x),
    lambda x: torch.einsum("i...->...", x),
    lambda x: torch.einsum("...ij->...ji", x),
    lambda x: torch.einsum("cab", x),
    lambda x: torch.einsum("abc,abd->acd", x, x),
    wary=[lambda x: torch.einsum("...i,...j->...ij", x, x[0])],
)
case("einsum", "aab,aba", wary=[lambda x: torch.einsum("iij->ij", x) if x.shape[0] == x.shape[1] else torch.einsum("iji->ij", x), lambda x: torch.einsum("iji->j", x) if x.shape[0] == x.shape[2] else torch.einsum("iij->j", x)])
case(
    "tensordot",
    "abc cda",
    wary=[
        lambda x, y: torch.tensordot(x, y, 1),
        lambda x, y: torch.kron(x, x),
        lambda x, y: torch.outer(x[0, 0], y[0, 0]),
        lambda x, y: torch.inner(x.contiguous(), x.contiguous()),
        lambda x, y: torch.ger(x[:, 0, 0], x[0, 0]),
        lambda x, y: torch.block_diag(x[0], x[1]),
        lambda x, y: torch.cartesian_prod(x[:, 0, 0].clone(), x[0, 0].clone()),
        lambda x, y: x.cov() if x.dim() < 3 else x[0].cov(),
        lambda x, y: torch.corrcoef(x[:, 0]),
        lambda x, y: torch.meshgrid(x[:, 0, 0], x[0, 0], indexing="ij"),
        lambda x, y: torch.rot90(x, 1, (0, 1)),
        lambda x, y: torch.aminmax(x, dim=0),
        lambda x, y: torch.isin(x.contiguous().round(), x[0].contiguous().round()),
        lambda x, y: x.unique(),
        lambda x, y: torch.linalg.multi_dot([x[0].contiguous(), x[1].mT.contiguous()]),
        lambda x, y: torch.combinations(x[:, 0, 0].clone()),
        lambda x, y: torch.cdist(x, x.flip(0)),
        lambda x, y: torch.trace(x[0].contiguous()),
        lambda x, y: x.rot90(),
        lambda x, y: torch.fliplr(x),
        lambda x, y: x.sum_to_size(1, *x.shape[1:]),
    ],
)
case("scaled_dot_product_attention", "abcd abcd abcd", lambda q, k, v: F.scaled_dot_product_attention(q, k, v), lambda q, k, v: F.scaled_dot_product_attention(q, key=k, value=v), c=4, d=4)
case("scaled_dot_product_attention", "abc ab", wary=[lambda q, m: F.scaled_dot_product_attention(q, q, q, m), lambda q, m: F.scaled_dot_product_attention(q, q, q, attn_mask=q), lambda q, m: F.scaled_dot_product_attention(q[None], q[:, None], q[:, None])], b=4, c=4)

# -- layers on images and normalisations ------------------------------------------------------------------------------

ONES = lambda *shape: torch.ones(shape, dtype=torch.float64) + torch.arange(shape[-1])  # noqa: E731
case("conv1d", "abc 3b2/c,abc 3b2", lambda x, w: F.conv1d(x, w), lambda x, w: F.conv1d(x, weight=w, stride=2), lambda x, w: F.conv1d(x, w, ONES(3)))
case("conv1d", "bc 3b2/c", wary=[lambda x, w: F.conv1d(x, w), lambda x, w: F.conv1d(x, weight=w)])
case("conv2d", "abcd", lambda x: F.conv2d(x, ONES(3, x.shape[1], 2, 2)), wary=[lambda x: F.conv2d(x[0], ONES(3, x.shape[1], 2, 2)), lambda x: F.conv2d(x[:, 0], ONES(3, x.shape[0], 1, 1))])
case("conv3d", "abcde", lambda x: F.conv3d(x, ONES(3, x.shape[1], 1, 1, 2)), c=2, d=2)
case("conv_transpose1d", "abc", lambda x: F.conv_transpose1d(x, ONES(x.shape[1], 3, 2)), wary=[lambda x: F.conv_transpose1d(x[0], ONES(x.shape[1], 3, 2))])
case("conv_transpose2d", "abcd", lambda x: F.conv_transpose2d(x, ONES(x.shape[1], 3, 1, 1)), c=2, d=2)
case("conv_transpose3d", "abcde", lambda x: F.conv_transpose3d(x, ONES(x.shape[1], 3, 1, 1, 1)), c=2, d=2)
for n in (1, 2, 3):
    spec = "abcde"[: n + 2]
    for name in (f"max_pool{n}d", f"avg_pool{n}d", f"adaptive_avg_pool{n}d", f"adaptive_max_pool{n}d"):
        case(name, spec, lambda x, f=name: getattr(F, f)(x, 2), wary=[lambda x, f=name: getattr(F, f)(x[0], 1), lambda x, f=name: getattr(F, f)(x[:, 0], 1)], c=4, d=4, e=4) if n < 3 else case(name, spec, lambda x, f=name: getattr(F, f)(x, 1), a=4, b=2, c=2, d=2, e=2)
    case(f"max_unpool{n}d", spec, lambda x, n=n: getattr(F, f"max_unpool{n}d")(x, torch.arange(x[0, 0].numel()).reshape(x.shape[2:]).expand(x.shape), 1), **dict.fromkeys("cde"[:n], 2))
    case(f"lp_pool{n}d", spec, lambda x, n=n: getattr(F, f"lp_pool{n}d")(x.abs(), 2.0, 2), **dict.fromkeys("cde"[:n], 2))
case("max_pool2d_with_indices", "abcd", lambda x: F.max_pool2d(x, 2, return_indices=True), lambda x: F.max_pool2d_with_indices(x, 2), c=4, d=4)
case("max_unpool1d", "abc abc/i", lambda x, i: F.max_unpool1d(x, i, 2), wary=[lambda x, i: F.max_unpool1d(x[0], i[0], 2)])
case("interpolate", "abc,abcd", lambda x: F.interpolate(x, scale_factor=2), lambda x: F.interpolate(x, size=3, mode="nearest"))
case("pixel_shuffle", "a4bc", lambda x: F.pixel_shuffle(x, 2), wary=[lambda x: F.pixel_shuffle(x[0], 2), lambda x: F.pixel_shuffle(x.transpose(0, 1), 1)])
case("pixel_unshuffle", "abcd", lambda x: F.pixel_unshuffle(x, 2), wary=[lambda x: F.pixel_unshuffle(x[0], 2)])
case("channel_shuffle", "a4bc", lambda x: F.channel_shuffle(x, 2), wary=[lambda x: F.channel_shuffle(x[0], 2)])
case("local_response_norm", "abc", lambda x: F.local_response_norm(x, 2))
case("grid_sample", "abcd aef2", lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False), c=2, e=2, f=2)
case("affine_grid", "a23", lambda x: F.affine_grid(x, [x.shape[0], 1, 2, 2], align_corners=False))
case("layer_norm", "abc", lambda x: F.layer_norm(x, x.shape[-1:]), lambda x: F.layer_norm(x, x.shape[1:]), lambda x: F.layer_norm(x, normalized_shape=(x.shape[-1],), weight=ONES(x.shape[-1])), wary=[lambda x: F.layer_norm(x, x.shape)])
case("rms_norm", "abc", lambda x: F.rms_norm(x, x.shape[-1:]), lambda x: F.rms_norm(x, normalized_shape=x.shape[1:]))
case("group_norm", "abc", lambda x: F.group_norm(x, 2), lambda x: F.group_norm(x, num_groups=1, weight=ONES(x.shape[1])), a=4, b=4, c=4)
case("instance_norm", "abc", lambda x: F.instance_norm(x), wary=[lambda x: F.instance_norm(x, torch.zeros(x.shape[1]).double(), ONES(x.shape[1]), use_input_stats=False), lambda x: F.instance_norm(x, torch.zeros(x.shape[1]).double(), ONES(x.shape[1]))])
case("batch_norm", "abc", lambda x: F.batch_norm(x, torch.zeros(x.shape[1]).double(), ONES(x.shape[1])))
case("embedding", "ab/i", lambda i: F.embedding(i, torch.randn(3, 2)), lambda i: F.embedding(input=i, weight=torch.randn(2, 5)))
case("embedding", "ab/i cd", lambda i, w: F.embedding(i, w), wary=[lambda i, w: F.embedding(i, weight=w), lambda i, w: F.embedding_bag(i, w), lambda i, w: F.embedding(i[:, 0], w)])
case("one_hot", "ab/i", lambda i: F.one_hot(i, 3), lambda i: torch.nn.functional.one_hot(i, num_classes=2))

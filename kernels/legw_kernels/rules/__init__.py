"""Update rules: pure functions of one tile, given to the kernels as `tl.constexpr`."""

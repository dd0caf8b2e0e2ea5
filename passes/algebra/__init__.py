"""The axis algebra: layouts as products of factors, tokens as views of them. Plain data, without Triton or Inductor."""

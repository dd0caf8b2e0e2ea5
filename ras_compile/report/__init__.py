"""The page, the picture and the animation that show where a generation computed: `handle.report("out.html")`."""

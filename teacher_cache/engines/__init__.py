"""Engines that run the teacher: they take the same requests and give the same records. `registry` lists them."""

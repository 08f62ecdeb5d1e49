"""Where a difference begins: bisection, a script that repeats it, a page."""

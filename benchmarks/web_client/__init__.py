"""What `benchmarks.web` runs in Node.js and in a browser."""

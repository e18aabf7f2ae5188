"""Where and how to push: candidates brought to one cost, and ranked by what they move."""

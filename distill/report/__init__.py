"""What a finished run says about itself: tables, curves and the page."""

"""What tuning's lines and their readers agree on."""

SHIPPED = "shipped"  # the contestant with the settings that users get

// Opened from a disk, a page may not read other pages: the search then lists titles without extracts.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
// The sidebar is longer than a window: it begins where one is.
addEventListener("DOMContentLoaded", () => {
  const box = document.querySelector(".sidebar-scroll"), here = document.querySelector(".sidebar-tree .current-page > a");
  const away = (here?.getBoundingClientRect().top ?? 0) - innerHeight / 3;
  if (box && away > 0) box.scrollBy({top: away, behavior: "instant"});
});

// Opened from a disk, a page may not read other pages: the search then lists titles without extracts.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
// The sidebar is longer than a window: it begins where one is.
addEventListener("DOMContentLoaded", () => {
  const box = document.querySelector(".sidebar-scroll"), here = document.querySelector(".sidebar-tree .current-page > a");
  if (box && here) box.scrollTop += here.getBoundingClientRect().top - innerHeight / 3;
});

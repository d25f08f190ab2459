// Give the page's address its last slash, which relative links need, and remove the token, which copied links
// should not contain. Then load the page's scripts.

const here = new URL(location.href);
if (!here.pathname.endsWith("/")) here.pathname += "/";
if (here.searchParams.has("token")) here.searchParams.delete("token");
if (here.href !== location.href) history.replaceState(null, "", here);

import(new URL("static/app.js", here)).catch((e) => {
  document.getElementById("what").textContent = `the page's scripts cannot be loaded: ${e.message}`;
  document.body.classList.add("known");
});
